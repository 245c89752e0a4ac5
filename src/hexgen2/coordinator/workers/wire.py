"""Messages between the owner and a worker: JSON arrays, a line each, over a socket pair of theirs alone."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, cast

from hexgen2.coordinator.errors import ApiError, EngineFailure
from hexgen2.coordinator.fleet import Want
from hexgen2.specs.classes import RequestSize
from hexgen2.specs.routing import Path

Message = list[Any]
"""What it is, and what belongs to it."""


class Wire(asyncio.Protocol):
    """One end. What is sent within one turn of the event loop goes out together."""

    def __init__(self, take: Callable[[Message], None], closed: Callable[[], None]) -> None:
        self._take = take
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._out: list[Message] = []

    async def open(self, end: socket.socket) -> None:
        """Talk over this socket from now on; it is closed with the wire."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    def send(self, *message: Any) -> None:
        """Lost where the other end is gone: `closed` tells."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(list(message))

    def close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self._transport is not None and not self._transport.is_closing():
            lines = [json.dumps(message, separators=(",", ":")) for message in out]
            self._transport.write(("\n".join(lines) + "\n").encode())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        self._transport = None
        self._closed()


def path_out(path: Path) -> list[str | None]:
    return [path.prefill, path.target]


def path_in(sent: list[Any]) -> Path:
    """Equal to the path that was sent; its share is not."""
    return Path(sent[0], sent[1], 0.0)


def want_out(want: Want) -> list[Any]:
    size = [want.size.prompt_tokens, want.size.max_tokens]
    return [want.one_engine, size, want.prefix, want.weight, want.priority, want.long]


def want_in(sent: list[Any]) -> Want:
    one_engine, size, prefix, weight, priority, long = sent
    return Want(one_engine, RequestSize(*size), tuple(prefix), weight, priority, long)


def error_out(error: ApiError | EngineFailure) -> list[Any]:
    if isinstance(error, EngineFailure):
        return ["engine", error.kind, error.group_id, error.detail]
    told = [error.status, error.message, error.kind, error.code, error.param, error.retry_after_s]
    return ["api", *told]


def error_in(sent: list[Any]) -> ApiError | EngineFailure:
    if sent[0] == "engine":
        return EngineFailure(*sent[1:])
    status, message, kind, code, param, retry_after_s = sent[1:]
    return ApiError(status, message, kind=kind, code=code, param=param, retry_after_s=retry_after_s)
