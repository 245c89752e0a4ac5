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
from hexgen2.vllm_plugin.kv_connector.shards import WorkerTable
from hexgen2.vllm_plugin.kv_connector.transport import NixlTransport
from hexgen2.vllm_plugin.kv_connector.wire import (
    LONGEST_REQUEST,
    PROTOCOL,
    Announce,
    Answer,
    Finish,
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

PUMP_S = 0.001
"""Pause between two looks at the network while a peer reads."""
LINGER_S = 60.0
"""How long it goes on for readers that went away in the middle of a read."""
GREETING_S = 1.0
"""How long after a greeting this side helps with the connection."""
ORDER_GRACE_S = 10.0
"""How long a reader that was faster than the scheduler's order is kept waiting: an engine step may take that
long.
"""
EXPIRY_S = 0.1
"""Pause between two looks for leases that are over."""


@dataclass(frozen=True)
class Identity:
    """Who this worker is: its engine's name, this start of it, the fingerprint of its model, and its table."""

    engine: str
    incarnation: str
    model: str
    table: WorkerTable


class ControlServer:
    """Serves one worker's lease book and table; `on_ended` is told which leases' blocks may be given back."""

    def __init__(
        self,
        identity: Identity,
        book: LeaseBook,
        transport: NixlTransport,
        on_ended: Callable[[list[EndedLease]], None],
    ) -> None:
        self._identity = identity
        self._book = book
        self._transport = transport
        self._on_ended = on_ended
        self._metadata = transport.metadata
        self._server: asyncio.Server | None = None
        self._ordered = asyncio.Condition()
        self._pump: asyncio.Handle | None = None
        self._pump_until = 0.0
        self._reading = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen on `port` (0: any); the port. Raises OSError if it is taken."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=LONGEST_REQUEST)
        self._spawn(self._expire())
        return int(self._server.sockets[0].getsockname()[1])

    async def order(self, lease: int, request: str, duration_s: float) -> None:
        """The scheduler has handed out a lease."""
        self._book.order(lease, request, duration_s=duration_s, now=time.monotonic())
        async with self._ordered:
            self._ordered.notify_all()
        self._collect()  # it may have been released before

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._pump is not None:
            self._pump.cancel()
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
        announced: set[tuple[int, str]] = set()
        try:
            number, hello = await asyncio.wait_for(read_request(reader), GREETING_S * 5)
            reply = self._welcome(hello)
            writer.write(frame(number, reply))
            await writer.drain()
            while not isinstance(reply, Refusal):
                number, request = await read_request(reader)
                # Side by side, since one of them may wait for the scheduler.
                answer = asyncio.ensure_future(self._respond(writer, number, request, announced))
                answering.add(answer)
                answer.add_done_callback(answering.discard)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError, asyncio.CancelledError):
            pass  # the peer has gone, or this server is closing
        except WireError as error:
            logger.warning("KV control: a peer was cut off: %s", error)
        finally:
            for answer in answering:
                answer.cancel()
            if announced:
                self._reading -= len(announced)
                self._pump_for(LINGER_S)  # it may have lost this connection only
            for lease, name in announced:  # who is gone holds nothing open beyond the lease itself
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
        self._pump_for(GREETING_S)
        return Welcome(mine.engine, self._metadata, mine.table)

    async def _respond(
        self, writer: asyncio.StreamWriter, number: int, request: Request, announced: set[tuple[int, str]]
    ) -> None:
        state = await self._state(request)
        if isinstance(request, Announce):
            self._reading += (request.lease, request.reader) not in announced
            announced.add((request.lease, request.reader))
            self._start_pump()
        elif isinstance(request, Finish) and (request.lease, request.reader) in announced:
            self._reading -= 1
            announced.discard((request.lease, request.reader))
        try:
            writer.write(frame(number, Answer(state is LeaseState.HELD, f"the lease is {state}")))
            await writer.drain()
        except ConnectionError:
            pass  # the reader is gone
        if isinstance(request, Finish | Release):
            self._collect()

    async def _state(self, request: Request) -> LeaseState:
        now = time.monotonic()
        match request:
            case Announce(lease=lease, reader=reader, hold_s=hold_s):
                if self._book.state(lease) is LeaseState.UNKNOWN:
                    await self._wait_for_order(lease)
                return self._book.announce(lease, reader, hold_s=hold_s, now=time.monotonic())
            case Finish(lease=lease, reader=reader):
                return self._book.finish(lease, reader)
            case Renew(lease=lease, duration_s=duration_s):
                return self._book.renew(lease, duration_s=duration_s, now=now)
            case Release(lease=lease):
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

    def _pump_for(self, seconds: float) -> None:
        self._pump_until = max(self._pump_until, time.monotonic() + seconds)
        self._start_pump()

    def _start_pump(self) -> None:
        if self._pump is None:
            self._pump = asyncio.get_running_loop().call_soon(self._pump_once)

    def _pump_once(self) -> None:
        """Look after the network while somebody reads or connects; a timer, since it may tick for long."""
        # Also for readers whose lease has ended: their reads must come to an end to be found invalid.
        if not self._reading and time.monotonic() >= self._pump_until:
            self._pump = None
            return
        pause = PUMP_S
        try:
            self._transport.progress()
        except Exception:  # NIXL raises its own types; the reader notices by itself
            logger.exception("KV transport: progress failed")
            pause = 0.1
        self._pump = asyncio.get_running_loop().call_later(pause, self._pump_once)
