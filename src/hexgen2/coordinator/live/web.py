"""The addresses of the live page: `/live` and its files, and `/live/state` with the figures. Read-only.

The files hold no data and are given to everyone. `/live/state` asks for an API key where keys are on, as
`/v1/` does; the page asks its reader for one then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from hexgen2.coordinator.errors import ApiError
from hexgen2.coordinator.live.live import Live
from hexgen2.coordinator.live.view import document
from hexgen2.report.live import CONTENT_SECURITY_POLICY, File, page_files
from hexgen2.specs.finite import finite

STATE = "/live/state"
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_routes(app: web.Application, live: Live, status: Callable[[], str], keys_on: bool) -> None:
    """Serve the page and its data; ``status``: of the whole service; ``keys_on``: it asks for API keys."""
    for path, file in page_files(keys_on).items():
        app.router.add_get(path, _serving(file))

    async def state(request: web.Request) -> web.Response:
        live.looked()
        after = _after(request.query.get("after"))
        found = document(live, status(), after, request.query.get("pictures") == "1")
        body = json.dumps(finite(found), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        response = web.Response(
            text=body,
            content_type="application/json",
            headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
        )
        response.enable_compression()
        return response

    app.router.add_get(STATE, state)


def _serving(file: File) -> Callable[[web.Request], Any]:
    async def serve(_: web.Request) -> web.Response:
        return web.Response(body=file.body, content_type=file.content_type, charset="utf-8", headers=_HEADERS)

    return serve


def _after(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 15:
        raise ApiError(400, f"after is {text[:40]!r}; give the `seq` of a state that was read before, or 0.")
    return int(text)
