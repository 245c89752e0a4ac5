"""HTML and SVG elements as text, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

CHARACTER = 0.6
"""Width of a character over the font size, about: pictures are laid out without a browser."""


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """``<tag attributes>children</tag>``.

    Children that are no markup are escaped; attribute ``class_`` is class, a_b is a-b, None is left out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_figure(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(child if isinstance(child, Markup) else escape(child, quote=False) for child in children)
    return Markup(f"<{tag}{given}>{inner}</{tag}>")


def joined(parts: Sequence[str]) -> Markup:
    """Parts one after the other, a line each."""
    return Markup("\n".join(part if isinstance(part, Markup) else escape(part, quote=False) for part in parts))


def picture(width: float, height: float, title: str, description: str, parts: Sequence[str]) -> Markup:
    """An SVG that fills the width it is given, with a title and a description for who does not see it."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        joined(parts),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}. {description}",
    )


def standalone(svg: Markup) -> str:
    """The SVG with its style inside, for a file of its own."""
    style = element("style", Markup(style_text()))
    start = svg.index(">") + 1
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{svg[:start]}{style}{svg[start:]}\n'


def style_text() -> str:
    """The style sheet of page and pictures."""
    return resources.files("hexgen2.report.page").joinpath("style.css").read_text(encoding="utf-8")


def shortened(text: str, width: float, size: float) -> str:
    """The text, with an ellipsis in its middle where it is wider than ``width`` at a font size.

    Both ends stay, since names often differ in their last characters.
    """
    most = max(3, int(width / (size * CHARACTER)))
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"


def _figure(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
