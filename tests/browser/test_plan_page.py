"""The page of a plan in a real browser, at desktop and phone width; skipped where there is no Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hexgen2.report.page import Trace, TracePoint, plan_page
from hexgen2.scheduler.schedule import schedule
from hexgen2.specs.plan import Plan, parse_plan
from tests.scheduler.support import A100, A6000, H100, L40, cluster, lengths, problem

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
# Measured inside a frame of the width to test: a headless window is never narrower than 500 px.
MEASURE = """
<!doctype html><meta charset="utf-8">
<iframe id="f" style="border:0;width:%dpx;height:900px" srcdoc="%s"></iframe>
<script>
const inside = (a, b) =>
  a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const over = (a, b) =>
  a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
document.getElementById("f").addEventListener("load", event => {
  const page = event.target.contentDocument, wide = page.documentElement.clientWidth;
  const found = {width: wide, scroll: page.documentElement.scrollWidth, texts: 0};
  for (const fault of ["clipped", "over", "outside", "small"]) found[fault] = [];
  for (const svg of page.querySelectorAll("svg")) {
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
  for (const cell of page.querySelectorAll("td, th, li, dd, p, h1, h2, figcaption")) {
    const box = cell.getBoundingClientRect();
    if (box.width && box.right > wide + 1) found.outside.push(cell.textContent);
  }
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


def pages() -> dict[str, Plan]:
    """A plan with KV routes over links, also with long names, a pipeline, many groups."""
    load = lengths(count=16)
    mixed = cluster((H100, 2), (A100, 4), (A6000, 4), (L40, 2), gbps=10)
    single = cluster((A6000, 1), (A6000, 1), (L40, 1), gbps=25)
    many = cluster(*((kind, 2) for kind in (H100, A100, L40, A6000) for _ in range(5)), gbps=25)
    routed = schedule(problem(mixed, load=load), solver="paper")
    long_names = re.sub(r'"n(\d)(/\d+)?"', r'"gpu-node-with-a-long-name-\1\2"', json.dumps(routed.document()))
    return {
        "long names": parse_plan(json.loads(long_names), "renamed"),
        "routes": routed,
        "pipeline": schedule(problem(single, load=load)),
        "many": schedule(problem(many, load=load), solver="distserve"),
    }


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return pages()


def measured(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What the browser says of a page at a width."""
    path = folder / f"measure-{width}.html"
    path.write_text(MEASURE % (width, html.escape(page)), encoding="utf-8")
    assert CHROMIUM is not None
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}")
    done = subprocess.run(
        [
            CHROMIUM,
            *flags,
            "--window-size=1300,1000",
            "--virtual-time-budget=5000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.S)
    assert found, done.stderr[-2000:]
    document: dict[str, Any] = json.loads(html.unescape(found[1]))
    return document


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["routes", "long names", "pipeline", "many"])
def test_nothing_is_cut_off_or_lies_over_something_else(
    name: str, width: int, plans: dict[str, Plan], tmp_path: Path
) -> None:
    trace = Trace((TracePoint(seconds=0.1, phase="start", value=plans[name].throughput_rps),), 0.5)
    found = measured(plan_page(plans[name], trace), width, tmp_path)
    assert found["width"] == pytest.approx(width, abs=20)  # a scroll bar may take some
    assert found["texts"] >= 10
    assert found["scroll"] <= found["width"]
    for fault in ("clipped", "over", "outside", "small"):
        assert found[fault] == [], f"{fault}: {found[fault]}"
