"""The prefill side's control server: tells readers where things lie, and whether their lease holds.

One in each worker, on the worker's transfer thread. It never waits for the engine, except for a lease that a
reader asks for before the scheduler's order has arrived.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from hexgen2.vllm_plugin.kv_connector.leases import EndedLease, LeaseBook, LeaseState
from hexgen2.vllm_plugin.kv_connector.pump import Pump
from hexgen2.vllm_plugin.kv_connector.shards import WorkerTable
from hexgen2.vllm_plugin.kv_connector.streams import StreamBook, Wanted
from hexgen2.vllm_plugin.kv_connector.transport import NixlTransport
from hexgen2.vllm_plugin.kv_connector.wire import (
    LONGEST_REQUEST,
    PROTOCOL,
    Advance,
    Announce,
    Answer,
    Finish,
    Follow,
    Hello,
    Refusal,
    Release,
    Renew,
    Reply,
    Request,
    Welcome,
    WireError,
    frame,
    read_request,
)

logger = logging.getLogger("vllm.hexgen2.kv")

LINGER_S = 60.0
"""How long this side helps readers that went away in the middle of a read."""
GREETING_S = 1.0
"""How long after a greeting this side helps with the connection."""
ORDER_GRACE_S = 10.0
"""How long a reader that was faster than the scheduler's order is kept waiting: an engine step may take that
long.
"""
EXPIRY_S = 0.1
"""Pause between two looks for leases that are over."""
LONGEST_WAIT_S = 30.0
"""A reader cannot make this side wait for longer with one question."""


@dataclass(frozen=True)
class Identity:
    """Who this worker is: its engine's name, this start of it, the fingerprint of its model, and its table."""

    engine: str
    incarnation: str
    model: str
    table: WorkerTable


Reading = tuple[int | str, str]
"""A lease (or a stream's key) and a reader's name."""


class _Readers:
    """What came over one connection: who announced itself, and whose reads are under way, for which the pump
    looks at the network. Also for those whose lease has ended: their reads must come to an end to be found
    invalid.
    """

    def __init__(self, pump: Pump) -> None:
        self.announced: set[Reading] = set()
        self._reading: set[Reading] = set()
        self._pump = pump

    def reads(self, reading: Reading) -> None:
        if reading not in self._reading:
            self._reading.add(reading)
            self._pump.serve(reading)

    def reads_no_more(self, reading: Reading) -> None:
        if reading in self._reading:
            self._reading.discard(reading)
            self._pump.served(reading)

    def gone(self) -> bool:
        """The connection is over. Whether reads were under way."""
        broken = bool(self._reading)
        for reading in list(self._reading):
            self.reads_no_more(reading)
        return broken


class ControlServer:
    """Serves one worker's lease book and table; `on_ended` is told which leases' blocks may be given back."""

    def __init__(
        self,
        identity: Identity,
        book: LeaseBook,
        streams: StreamBook,
        transport: NixlTransport,
        on_ended: Callable[[list[EndedLease]], None],
    ) -> None:
        self._identity = identity
        self._book = book
        self._streams = streams
        self._on_ended = on_ended
        self._metadata = transport.metadata
        self._server: asyncio.Server | None = None
        self._ordered = asyncio.Condition()
        self._pump = transport.pump
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen on `port` (0: any); the port. Raises OSError if it is taken."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=LONGEST_REQUEST)
        self._spawn(self._expire())
        return int(self._server.sockets[0].getsockname()[1])

    async def order(self, lease: int, request: str, duration_s: float, stream: str = "") -> None:
        """The scheduler has handed out a lease; for a request that could be followed under the key `stream`."""
        self._book.order(lease, request, duration_s=duration_s, now=time.monotonic())
        if stream:
            self._streams.leased(stream, lease)
        async with self._ordered:
            self._ordered.notify_all()
        self._collect()  # it may have been released before

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        answering: set[asyncio.Task[None]] = set()
        readers = _Readers(self._pump)
        try:
            number, hello = await asyncio.wait_for(read_request(reader), GREETING_S * 5)
            reply = self._welcome(hello)
            writer.write(frame(number, reply))
            await writer.drain()
            while not isinstance(reply, Refusal):
                number, request = await read_request(reader)
                # Side by side, since one of them may wait for the scheduler.
                answer = asyncio.ensure_future(self._respond(writer, number, request, readers))
                answering.add(answer)
                answer.add_done_callback(answering.discard)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError, asyncio.CancelledError):
            pass  # the peer has gone, or this server is closing
        except WireError as error:
            logger.warning("KV control: a peer was cut off: %s", error)
        finally:
            for answer in answering:
                answer.cancel()
            if readers.gone():
                self._pump.serve_for(LINGER_S)  # it may have lost this connection only
            for lease, name in readers.announced:  # who is gone holds nothing open beyond the lease itself
                if isinstance(lease, str):
                    self._streams.finish(lease, name)
                else:
                    self._book.finish(lease, name)
            writer.close()
            self._tasks.discard(task)

    def _welcome(self, hello: Request) -> Reply:
        mine = self._identity
        if not isinstance(hello, Hello):
            return Refusal("the first message must be a greeting")
        if hello.protocol != PROTOCOL:
            return Refusal(
                f"this engine speaks protocol {PROTOCOL}, not {hello.protocol}; use one version of hexgen2"
            )
        if hello.worker != mine.incarnation:
            return Refusal("the engine has been restarted since")
        if hello.model != mine.model:
            return Refusal(
                f"the engine serves another model or KV cache type ({mine.model} there, {hello.model} here)"
            )
        if not hello.tables:
            return Welcome(mine.engine, b"", None)
        self._pump.serve_for(GREETING_S)
        return Welcome(mine.engine, self._metadata, mine.table)

    async def _respond(
        self,
        writer: asyncio.StreamWriter,
        number: int,
        request: Request,
        readers: _Readers,
    ) -> None:
        reply: Reply
        if isinstance(request, Follow):
            readers.reads_no_more((request.key, request.reader))
            reply = advance = await self._advance(request)
            if request.reader and advance.state == LeaseState.HELD:
                readers.announced.add((request.key, request.reader))
                readers.reads((request.key, request.reader))
        else:
            reply = answer = await self._answer(request)
            # Who is not allowed to read will not tell the end of it either.
            if isinstance(request, Announce) and answer.held:
                readers.announced.add((request.lease, request.reader))
                readers.reads((request.lease, request.reader))
            elif isinstance(request, Finish):
                readers.announced.discard((request.lease, request.reader))
                readers.reads_no_more((request.lease, request.reader))
        try:
            writer.write(frame(number, reply))
            await writer.drain()
        except ConnectionError:
            pass  # the reader is gone
        if isinstance(request, Finish | Release):
            self._collect()

    async def _advance(self, request: Follow) -> Advance:
        wanted = Wanted(request.wanted, request.stop)
        await self._streams.wait(request.key, wanted, min(request.wait_s, LONGEST_WAIT_S))
        if request.reader:
            now = time.monotonic()
            self._streams.announce(request.key, request.reader, hold_s=request.hold_s, now=now)
        state, reason, progress, blocks = self._streams.look(request.key, request.blocks)
        return Advance(state, reason, progress.done, progress.layers, progress.ahead, blocks)

    async def _answer(self, request: Request) -> Answer:
        now = time.monotonic()
        match request:
            case Announce(lease=str(key), reader=reader, hold_s=hold_s):
                state, reason = self._streams.announce(key, reader, hold_s=hold_s, now=now)
            case Finish(lease=str(key), reader=reader):
                state, reason = self._streams.finish(key, reader)
            case Renew(lease=str(key), duration_s=duration_s):
                state, reason = self._streams.renew(key, duration_s=duration_s, now=now)
            case Release(lease=str(key)):
                state, reason = self._streams.release(key)
            case _:
                state = await self._state(request)
                reason = f"the lease is {state}"
        return Answer(state is LeaseState.HELD, reason)

    async def _state(self, request: Request) -> LeaseState:
        now = time.monotonic()
        match request:
            case Announce(lease=int(lease), reader=reader, hold_s=hold_s):
                if self._book.state(lease) is LeaseState.UNKNOWN:
                    await self._wait_for_order(lease)
                return self._book.announce(lease, reader, hold_s=hold_s, now=time.monotonic())
            case Finish(lease=int(lease), reader=reader):
                return self._book.finish(lease, reader)
            case Renew(lease=int(lease), duration_s=duration_s):
                return self._book.renew(lease, duration_s=duration_s, now=now)
            case Release(lease=int(lease)):
                return self._book.release(lease)
        return LeaseState.ENDED  # a second greeting

    async def _wait_for_order(self, lease: int) -> None:
        try:
            async with asyncio.timeout(ORDER_GRACE_S), self._ordered:
                await self._ordered.wait_for(lambda: self._book.state(lease) is not LeaseState.UNKNOWN)
        except TimeoutError:
            pass  # the caller sees that it is still not known

    def _collect(self) -> None:
        if ended := self._book.collect(time.monotonic()):
            self._on_ended(ended)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_S)
            self._collect()
            self._streams.forget(time.monotonic())
