"""The files of the live page. They come with the package; nothing is built, nothing loaded from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from hexgen2.report.page.markup import style_text

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class File:
    """A file to be served."""

    content_type: str
    body: bytes


_KEYS_OFF, _KEYS_ON = (b'name="hexgen2-keys" content="%s"' % state for state in (b"off", b"on"))


def page_files(keys_on: bool) -> dict[str, File]:
    """The files by their path on the server; the page asks for an API key first where ``keys_on``.

    The style is that of a plan's page, with what is live added.
    """
    page = _read("page.html")
    return {
        "/live": File("text/html", page.replace(_KEYS_OFF, _KEYS_ON) if keys_on else page),
        "/live/page.css": File("text/css", style_text().encode() + _read("live.css")),
        "/live/page.js": File("text/javascript", _read("page.js")),
        "/live/charts.js": File("text/javascript", _read("charts.js")),
    }


def _read(name: str) -> bytes:
    return resources.files("hexgen2.report.live").joinpath(name).read_bytes()
