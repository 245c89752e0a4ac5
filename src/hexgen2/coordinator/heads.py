"""A time limit on clients that connect and then say nothing, or say it byte by byte (slow loris)."""

from __future__ import annotations

import asyncio
import math

from aiohttp import web

KEEPALIVE_S = 75.0
"""After its first request a connection may be silent for so long; also the limit on later requests' heads."""


class Heads:
    """Closes connections on which no whole head has come in time."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: dict[object, float] = {}

    def came(self, connection: object) -> None:
        """A request has come over this connection: aiohttp's own limit counts from now on."""
        self._since[connection] = math.inf

    async def watch(self, server: web.Server) -> None:
        """Until cancelled."""
        clock, pause_s = asyncio.get_running_loop().time, min(1.0, self._limit_s / 4)
        while True:
            await asyncio.sleep(pause_s)
            now = clock()
            since: dict[object, float] = {}
            for connection in server.connections:
                since[connection] = at = self._since.get(connection, now)
                if now - at > self._limit_s:
                    connection.force_close()
            self._since = since
