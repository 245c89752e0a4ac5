"""The answer to a client that streams."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiohttp
from aiohttp import web

from hexgen2.coordinator.errors import ClientGone

# What may lie unsent for a client that reads slowly; then its engine has to wait.
_UNSENT_BYTES = 2**16
_PAUSE_S = 0.01


class ClientStream:
    """A response that has begun. ClientGone from any method: the client's going away must not look like a
    failure of the engine that is being read.

    Blocks go to the client's connection directly, framed here: what aiohttp does between `write` and the
    connection would be a fifth of all that is done with a token.
    """

    def __init__(self, response: web.StreamResponse, transport: asyncio.Transport, patience_s: float) -> None:
        self._response = response
        self._transport = transport
        self._patience_s = patience_s
        self._chunked = response.headers.get("Transfer-Encoding") == "chunked"  # HTTP/1.0 knows no chunks

    @classmethod
    async def begin(
        cls, http: web.Request, headers: Mapping[str, str], first: bytes, patience_s: float
    ) -> ClientStream:
        """Send the head and the first block; `patience_s` as for `Timeouts.take_s`."""
        response = web.StreamResponse(headers={**headers, "Cache-Control": "no-cache"})
        try:
            await response.prepare(http)
            # aiohttp keeps the head back until something follows: an empty event, if need be.
            await response.write(first or b":\n\n")
        except (ConnectionError, aiohttp.ClientError) as error:
            raise ClientGone from error
        transport = http.transport
        if transport is None:
            raise ClientGone
        return cls(response, transport, patience_s)

    def put(self, data: bytes) -> bool:
        """Send a block, which is not empty; False where the client should first take what there is (`room`)."""
        if self._transport.is_closing():
            raise ClientGone
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return self._transport.get_write_buffer_size() < _UNSENT_BYTES

    async def room(self) -> None:
        """Wait until the client has taken what lies here. One that takes nothing more, though its connection
        stands, would hold its place until the request's end: it is cut off."""
        clock = asyncio.get_running_loop().time
        least, since = self._transport.get_write_buffer_size(), clock()
        while (left := self._transport.get_write_buffer_size()) >= _UNSENT_BYTES:
            if self._transport.is_closing():
                raise ClientGone
            if left < least:
                least, since = left, clock()
            elif clock() - since > self._patience_s:
                self._transport.abort()
                raise ClientGone
            await asyncio.sleep(_PAUSE_S)

    async def end(self, last: bytes = b"") -> web.StreamResponse:
        """Send a last block and the end; the response."""
        if last:
            self.put(last)
        await self.room()
        try:
            await self._response.write_eof()
        except (ConnectionError, aiohttp.ClientError) as error:
            raise ClientGone from error
        return self._response
