"""Connections to other engines' workers: the client side of the control messages.

A connection is opened at the first need, greeted, and kept. It is bound to one *incarnation* of the worker:
after a restart of the engine the old offers name an incarnation that is no more, and are refused instead of
being read from whatever lies there now. A broken connection is known at once (the kernel says so), not after a
timeout.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hexgen2.vllm_plugin.kv_connector.keyed_locks import KeyedLocks
from hexgen2.vllm_plugin.kv_connector.params import WorkerAddress
from hexgen2.vllm_plugin.kv_connector.shards import WorkerTable
from hexgen2.vllm_plugin.kv_connector.transport import NixlTransport
from hexgen2.vllm_plugin.kv_connector.wire import (
    LONGEST_REPLY,
    PROTOCOL,
    Advance,
    Answer,
    Follow,
    Hello,
    Reply,
    Request,
    Welcome,
    WireError,
    frame,
    read_reply,
)

logger = logging.getLogger("vllm.hexgen2.kv")


class PeerError(Exception):
    """A peer cannot be reached, refuses, or has gone."""


class Connection:
    """One connection to one worker. Questions may overlap; answers are matched by number."""

    def __init__(
        self, address: WorkerAddress, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.address = address
        self.closed = ""
        """Why the connection is over; empty while it is not."""
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._listening = asyncio.ensure_future(self._listen())

    @classmethod
    async def open(
        cls, address: WorkerAddress, model: str, *, tables: bool, timeout_s: float
    ) -> tuple[Connection, Welcome]:
        """Connect and greet. Raises PeerError."""
        where = f"{address.host}:{address.port}"
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(address.host, address.port, limit=LONGEST_REPLY)
                connection = cls(address, reader, writer)
                try:
                    reply = await connection._ask(Hello(PROTOCOL, model, address.incarnation, tables))
                except BaseException:
                    await connection.close()
                    raise
        except TimeoutError as error:
            raise PeerError(f"{where} did not answer within {timeout_s:g} s") from error
        except OSError as error:
            raise PeerError(f"{where} cannot be reached ({error.strerror or error})") from error
        if isinstance(reply, Welcome):
            return connection, reply
        await connection.close()
        raise PeerError(f"{where} refused: {reply.reason}")

    async def ask(self, request: Request, timeout_s: float) -> Answer:
        """Ask and wait for the answer. Raises PeerError."""
        reply = await self._ask_within(request, timeout_s)
        if not isinstance(reply, Answer):
            raise PeerError(f"an unexpected {type(reply).__name__}")
        return reply

    async def follow(self, request: Follow, timeout_s: float) -> Advance:
        """Ask how far a stream has come. Raises PeerError."""
        reply = await self._ask_within(request, timeout_s)
        if not isinstance(reply, Advance):
            raise PeerError(f"an unexpected {type(reply).__name__}")
        return reply

    async def _ask_within(self, request: Request, timeout_s: float) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(request)
        except TimeoutError as error:
            raise PeerError(
                f"{self.address.host}:{self.address.port} did not answer within {timeout_s:g} s"
            ) from error

    async def _ask(self, request: Request) -> Reply:
        if self.closed:
            raise PeerError(self.closed)
        number = next(self._numbers)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._writer.write(frame(number, request))
            return await future
        finally:
            self._waiting.pop(number, None)

    async def _listen(self) -> None:
        reason = "the peer closed the connection"
        try:
            while True:
                number, reply = await read_reply(self._reader)
                future = self._waiting.get(number)
                if future is not None and not future.done():
                    future.set_result(reply)
        except asyncio.IncompleteReadError:
            pass
        except (OSError, WireError) as error:
            reason = f"the connection broke ({error})"
        finally:
            self.closed = f"{self.address.host}:{self.address.port}: {reason}"
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(PeerError(self.closed))
            self._writer.close()

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)


@dataclass(eq=False)
class Peer:
    """A worker that can be read from. `reads` counts those under way; who is `leaving` gets no new ones."""

    address: WorkerAddress
    connection: Connection
    engine: str
    table: WorkerTable
    reads: int = 0
    leaving: bool = False


class Peers:
    """The workers that this worker reads from, by incarnation."""

    def __init__(self, model: str, transport: NixlTransport, incarnation: str, timeout_s: float) -> None:
        self._model = model
        self._transport = transport
        self._incarnation = incarnation
        self._timeout_s = timeout_s
        self._peers: dict[str, Peer] = {}
        self._locks = KeyedLocks()

    async def get(self, address: WorkerAddress) -> Peer:
        """A connected peer. Raises PeerError."""
        async with self._locks.holding(address.incarnation):  # two requests should not greet a peer twice
            peer = self._peers.get(address.incarnation)
            if peer is not None and not peer.connection.closed:
                return peer
            if peer is not None:
                await self.drop(peer)
            peer = self._peers[address.incarnation] = await self._connect(address)
            return peer

    async def _connect(self, address: WorkerAddress) -> Peer:
        connection, welcome = await Connection.open(
            address, self._model, tables=True, timeout_s=self._timeout_s
        )
        if welcome.table is None:
            await connection.close()
            raise PeerError(f"{address.host}:{address.port} sent no table")
        try:
            # A worker may read from itself, when one engine does both legs of a request.
            if address.incarnation != self._incarnation:
                self._transport.connect(address.incarnation, welcome.metadata)
        except Exception as error:  # NIXL raises its own types
            await connection.close()
            raise PeerError(f"{address.host}:{address.port}: NIXL cannot use it ({error})") from error
        logger.info("KV transfer: connected to %s at %s:%d", welcome.engine, address.host, address.port)
        return Peer(address, connection, welcome.engine, welcome.table)

    async def drop(self, peer: Peer) -> None:
        """Forget a peer; the next `get` starts anew.

        Its connections stay until the reads under way are over: the other side helps with them for as long.
        """
        if self._peers.get(peer.address.incarnation) is peer:
            del self._peers[peer.address.incarnation]
        if not peer.leaving:
            peer.leaving = True
            if not peer.reads:
                await self._leave(peer)

    @asynccontextmanager
    async def reading(self, peer: Peer) -> AsyncIterator[None]:
        """Around a read from a peer."""
        peer.reads += 1
        try:
            yield
        finally:
            peer.reads -= 1
            if peer.leaving and not peer.reads:
                await self._leave(peer)

    async def _leave(self, peer: Peer) -> None:
        if peer.address.incarnation != self._incarnation:
            self._transport.disconnect(peer.address.incarnation)
        await peer.connection.close()

    async def close(self) -> None:
        for peer in list(self._peers.values()):
            await self.drop(peer)
