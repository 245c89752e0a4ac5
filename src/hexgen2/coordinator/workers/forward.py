"""Requests that the owner answers: whatever is not generation."""

from __future__ import annotations

from pathlib import Path

import aiohttp
from aiohttp import web

from hexgen2.coordinator.errors import ApiError
from hexgen2.coordinator.surface import Surface, expect

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class Forwarder:
    """Passes requests to the owner's Unix socket, and its answers back as they come."""

    def __init__(self, owner: Path, surface: Surface) -> None:
        self._owner = str(owner)
        self._surface = surface
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._owner, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def add_to(self, app: web.Application) -> None:
        app.router.add_route("*", "/{path:.*}", self.forward, expect_handler=expect)

    async def forward(self, http: web.Request) -> web.StreamResponse:
        assert self._session is not None, "not started"
        body = await self._surface.body(http) if http.can_read_body else None
        headers = [(name, value) for name, value in http.headers.items() if name.lower() not in _HOP_BY_HOP]
        try:
            async with self._session.request(
                http.method, f"http://owner{http.raw_path}", data=body, headers=headers, allow_redirects=False
            ) as answer:
                response = web.StreamResponse(status=answer.status, reason=answer.reason)
                for name, value in answer.headers.items():
                    if name.lower() not in _HOP_BY_HOP:
                        response.headers.add(name, value)
                response.content_length = answer.content_length
                await response.prepare(http)
                async for data in answer.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response
        except (aiohttp.ClientConnectionError, ValueError) as error:
            if isinstance(error, ValueError):
                raise ApiError(400, "This address cannot be read.") from error
            message = "The service's own process does not answer."
            raise ApiError(503, message, kind="server_error", retry_after_s=1.0) from error
