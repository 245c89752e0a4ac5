"""HTTP/1.1 connections to engines, kept and used again.

Each token of a stream is a piece of some answer's body. Here it goes from the socket through the parser to its
receiver in one call, without a buffer, a future or a task in between: with a general HTTP client that, and the
further turn of the event loop that it takes, cost as much as everything else that is done with a token.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

# Shorter than the 5 s after which uvicorn closes an idle connection: a request must not meet a closing one.
KEEPALIVE_S = 3.0

# How long the end of a body may take after its receiver has let go of it, before the connection is closed
# instead of kept.
TAIL_S = 0.2


# What keeps this machine from making any connection, however well the other end is.
_LACKS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


def lacks_means(error: OSError) -> bool:
    """Whether a connection failed for want of descriptors, memory or ports here, which says nothing of the
    engine: taking it for dead would end all that it works on."""
    return error.errno in _LACKS


class Receiver(Protocol):
    """Who gets an answer, as it comes."""

    def headed(self, status: int, content_type: str) -> None:
        """The answer's head."""
        ...

    def received(self, data: bytes) -> None:
        """More of its body."""
        ...

    def ended(self, whole: bool) -> None:
        """Nothing more comes: it is whole, or the connection broke."""
        ...


class Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._parts: list[bytes] = []
        self._headed = self._whole = self._sized = False
        self._surplus = False  # more than one answer came
        self._lasting = True  # the connection outlasts the answer
        self._content_type = ""
        self.idle_since = 0.0
        self.let_go = False  # only the end of the body is missing, and nobody waits for it

    # What the call does

    def send(self, receiver: Receiver, path: str, headers: Mapping[str, str], body: bytes) -> None:
        """POST a body. ValueError for headers that would be more than headers."""
        assert self._transport is not None, "not connected"
        lines = [f"POST {path} HTTP/1.1", f"Host: {self._pool.host}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise ValueError("a line break in a header")
        self._receiver, self._parts = receiver, []
        self._headed = self._whole = self._sized = False
        self._content_type = "application/json"
        self._transport.write(head.encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body)

    def pause(self) -> None:
        """Read no more for now: the engine is to wait for whoever takes its answer."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def release(self, done: bool) -> None:
        """The receiver wants no more. A connection whose answer is whole serves again, and one whose answer is
        but for its last bytes (`done`); any other is closed, which makes the engine stop generating."""
        self._receiver = None
        self.resume()
        if self._whole and self._transport is not None and not self._transport.is_closing():
            self._pool.keep(self)
        elif done and self._transport is not None:
            self.let_go = True
            self._pool.keep(self)
        else:
            self.close()

    @property
    def usable(self) -> bool:
        return self._whole and self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's are not subclasses of asyncio's.
        self._transport, self._whole = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        if self._whole:  # nobody asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end(False)
            self.close()
            return
        if self._parts:
            parts, self._parts = self._parts, []
            if self._receiver is not None:
                self._receiver.received(parts[0] if len(parts) == 1 else b"".join(parts))
        if self._whole:
            self._end(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        if not self._whole:
            # A body of no given length ends with its connection.
            self._end(exc is None and self._headed and not self._sized)

    def _end(self, whole: bool) -> None:
        receiver, self._receiver = self._receiver, None
        self._whole, self.let_go = True, False
        if not whole or self._surplus or not self._lasting:
            self.close()
        if receiver is not None:
            receiver.ended(whole)

    # The parser's side

    def on_message_begin(self) -> None:
        self._surplus = self._whole

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._content_type = value.decode("latin-1")
        elif name in (b"content-length", b"transfer-encoding"):
            self._sized = True

    def on_headers_complete(self) -> None:
        if self._surplus:
            return
        status = self._parser.get_status_code()
        self._headed = status >= 200
        if self._headed and self._receiver is not None:
            self._receiver.headed(status, self._content_type)

    def on_body(self, data: bytes) -> None:
        if not self._surplus:
            self._parts.append(data)

    def on_message_complete(self) -> None:
        self._whole = self._headed  # "100 Continue" and its like come before the answer
        self._lasting = self._parser.should_keep_alive()  # to be asked here: it forgets the answer with its end


class Pool:
    """The connections to one engine that wait for work; the latest is taken first.

    ``trust``: whose certificates are good, where the address is an https:// one; None: the system's.
    """

    def __init__(self, url: str, trust: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "an engine's address has a host"
        self._secure = parts.scheme == "https"
        self._address = (parts.hostname, parts.port or (443 if self._secure else 80))
        self.host = parts.netloc.rpartition("@")[2]
        self.prefix = parts.path.rstrip("/")
        self._trust = trust
        self._idle: dict[Connection, None] = {}

    @cached_property
    def _tls(self) -> ssl.SSLContext | None:
        return (self._trust or ssl.create_default_context()) if self._secure else None

    def take(self) -> Connection | None:
        """A connection that is there."""
        for connection in reversed(self._idle):
            if connection.usable:
                del self._idle[connection]
                return connection
        return None

    async def connect(self) -> Connection:
        """A new one; OSError where the engine cannot be reached."""
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(lambda: Connection(self), *self._address, ssl=self._tls)
        return made

    def keep(self, connection: Connection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def close_old(self, now: float) -> None:
        """Close those that have been idle for too long, or whose last answer does not end."""
        for connection in list(self._idle):
            if now - connection.idle_since > (TAIL_S if connection.let_go else KEEPALIVE_S):
                del self._idle[connection]
                connection.close()

    def close(self) -> None:
        for connection in list(self._idle):
            connection.close()
        self._idle.clear()
