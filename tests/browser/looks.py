"""What the browser says of a page: widths, text that is cut off or lies over other text, the order of focus."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.async_api import Browser, ConsoleMessage, Page, Request

PHONE, DESK = 390, 1200
FAULTS = ("clipped", "over", "outside", "small")
MEASURE = """
() => {
  const inside = (a, b) =>
    a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
  const over = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const wide = document.documentElement.clientWidth;
  const found = {width: wide, scroll: document.documentElement.scrollWidth, texts: 0,
    clipped: [], over: [], outside: [], small: []};
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
    const scale = frame.width / svg.viewBox.baseVal.width;
    found.texts += texts.length;
    texts.forEach((text, place) => {
      const box = text.getBoundingClientRect(), words = text.textContent;
      if (!inside(box, frame)) found.clipped.push(words);
      if (parseFloat(getComputedStyle(text).fontSize) * scale < 9.5) found.small.push(words);
      for (const other of texts.slice(place + 1))
        if (over(box, other.getBoundingClientRect())) found.over.push(words + " | " + other.textContent);
    });
    for (const group of svg.querySelectorAll("g.box, g.node")) {
      const frame = group.querySelector("rect").getBoundingClientRect();
      for (const text of group.querySelectorAll("text"))
        if (!inside(text.getBoundingClientRect(), frame)) found.outside.push(text.textContent);
    }
  }
  for (const cell of document.querySelectorAll("td, th, li, dd, p, h1, h2, h3, button, label, figcaption")) {
    const box = cell.getBoundingClientRect();
    if (box.width && box.right > wide + 1) found.outside.push(cell.textContent);
  }
  return found;
}
"""
FOCUSED = """
() => {
  const node = document.activeElement;
  if (!node || node === document.body) return null;
  const seen = node.matches("fieldset input") ? node.nextElementSibling : node;
  const style = getComputedStyle(seen), box = seen.getBoundingClientRect();
  const label = node.getAttribute("aria-label") ?? node.id;
  return {
    name: (label || node.value || node.textContent).trim(),
    tag: node.tagName.toLowerCase(),
    shown: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    inView: box.bottom > 0 && box.right > 0 && box.top < innerHeight && box.left < innerWidth,
  };
}
"""


@dataclass
class Watched:
    """A page, what it complained of, and what it loaded."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def requested(self, request: Request) -> None:
        self.loaded.append(request.url)

    async def measured(self) -> dict[str, Any]:
        """`MEASURE` of the page as it is now."""
        found: dict[str, Any] = await self.page.evaluate(MEASURE)
        return found

    async def barriers(self) -> list[str]:
        """What axe-core finds that people with disabilities would stumble over: rule, and where."""
        from axe_playwright_python.async_playwright import Axe

        found = (await Axe().run(self.page)).response
        return [f"{rule['id']}: {node['html']}" for rule in found["violations"] for node in rule["nodes"]]

    async def tabbed(self) -> list[dict[str, Any]]:
        """Everything that Tab reaches, from the beginning to where it starts again."""
        found: list[dict[str, Any]] = []
        for _ in range(100):
            await self.page.keyboard.press("Tab")
            focused = await self.page.evaluate(FOCUSED)
            if focused is None or (found and focused["name"] == found[0]["name"]):
                return found
            found.append(focused)
        raise AssertionError("Tab does not come round")


@contextlib.asynccontextmanager
async def opened(
    browser: Browser, url: str, width: int = DESK, scheme: str = "light"
) -> AsyncIterator[Watched]:
    """A page at a width."""
    page = await browser.new_page(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.set_default_timeout(60_000)  # the tests' machine may be busy
    watched = Watched(page)
    page.on("console", watched.said)
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    page.on("request", watched.requested)
    try:
        await page.goto(url)
        yield watched
    finally:
        await page.close()
