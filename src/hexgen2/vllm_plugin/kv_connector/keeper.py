"""Keeps leases alive while requests wait for their turn, and gives them back.

Runs in the decode engine's scheduler process. It speaks to the prefill engine's workers directly, all of them:
each keeps its own book. Nothing here may fail a request or hold up the scheduler: a lease that cannot be
renewed or released runs out by itself, and the load then finds it ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from hexgen2.vllm_plugin.kv_connector.keyed_locks import KeyedLocks
from hexgen2.vllm_plugin.kv_connector.leases import LeaseState
from hexgen2.vllm_plugin.kv_connector.loop_thread import LoopThread
from hexgen2.vllm_plugin.kv_connector.params import Offer, Stream, WorkerAddress
from hexgen2.vllm_plugin.kv_connector.peers import Connection, PeerError
from hexgen2.vllm_plugin.kv_connector.wire import Follow, Release, Renew

logger = logging.getLogger("vllm.hexgen2.kv")

IDLE_S = 60.0
"""A connection that nobody used for so long is closed."""
FOLLOW_S = 5.0
"""Longest wait for one word about a prefill that has not begun."""


@dataclass
class Watch:
    """What is known of a prefill that may not have begun. Written on the keeper's thread, read on the
    scheduler's. `lost` says why nobody waits for it any more.
    """

    begun: bool = False
    lost: str = ""


class LeaseKeeper:
    """Renews tracked offers every third of their lease; `release` ends one."""

    def __init__(self, model: str, timeout_s: float) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._thread: LoopThread | None = None
        self._tracked: dict[tuple[str, int | str], asyncio.Task[None]] = {}
        self._connections: dict[str, Connection] = {}
        self._idle: dict[str, asyncio.TimerHandle] = {}
        self._locks = KeyedLocks()
        self._tasks: set[asyncio.Task[None]] = set()

    def track(self, offer: Offer) -> None:
        """Start renewing an offer's lease."""
        self._loop().call(self._track, offer)

    def follow(self, stream: Stream, within_s: float) -> Watch:
        """Watch for a prefill's beginning, for `within_s` seconds; then keep alive the lease that follows."""
        watch = Watch()
        self._loop().call(self._follow, stream, watch, within_s)
        return watch

    def release(self, offer: Offer | Stream) -> None:
        """Stop renewing, and tell every worker that the blocks are no longer needed."""
        self._loop().call(self._release, offer)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.stop()

    def _loop(self) -> LoopThread:
        # Not at construction: an engine that only prefills needs no thread.
        if self._thread is None:
            self._thread = LoopThread("hexgen2-kv-keeper")
        return self._thread

    def _track(self, offer: Offer) -> None:
        key = (offer.workers[0].incarnation, offer.lease)
        if key not in self._tracked:
            self._tracked[key] = asyncio.ensure_future(self._renew(offer))

    def _follow(self, stream: Stream, watch: Watch, within_s: float) -> None:
        key = (stream.workers[0].incarnation, stream.lease)
        self._tracked[key] = asyncio.ensure_future(self._watch(stream, watch, within_s))

    async def _watch(self, stream: Stream, watch: Watch, within_s: float) -> None:
        """The first worker speaks for all: they begin with the same engine step."""
        deadline = time.monotonic() + within_s
        try:
            while not watch.begun:
                connection = await self._connection(stream.workers[0])
                news = await connection.follow(
                    Follow(stream.key, "", 0.0, 0, 0, 0, FOLLOW_S), FOLLOW_S + self._timeout_s
                )
                if news.state == LeaseState.ENDED:
                    watch.lost = news.reason
                    return
                watch.begun = news.state == LeaseState.HELD
                if not watch.begun and time.monotonic() > deadline:
                    watch.lost = f"the prefill has not begun within {within_s:g} s"
                    return
        except PeerError as error:
            watch.lost = str(error)
            return
        await self._renew(stream)

    def _release(self, offer: Offer | Stream) -> None:
        renewing = self._tracked.pop((offer.workers[0].incarnation, offer.lease), None)
        if renewing is not None:
            renewing.cancel()
        task = asyncio.ensure_future(self._send_releases(offer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _renew(self, offer: Offer | Stream) -> None:
        while True:
            await asyncio.sleep(offer.lease_s / 3)
            message = Renew(offer.lease, offer.lease_s)
            held = await asyncio.gather(*(self._tell(worker, message) for worker in offer.workers))
            if not all(held):
                return  # ended; the load will say so

    async def _send_releases(self, offer: Offer | Stream) -> None:
        await asyncio.gather(*(self._tell(worker, Release(offer.lease)) for worker in offer.workers))

    async def _tell(self, worker: WorkerAddress, message: Renew | Release) -> bool:
        """Send a message; whether the lease was held. One new try over a fresh connection, then it is left."""
        for attempt in (1, 2):
            try:
                connection = await self._connection(worker)
                return (await connection.ask(message, self._timeout_s)).held
            except PeerError as error:
                if attempt == 2:
                    logger.info("KV lease %s: %s", message.lease, error)
        return False

    async def _connection(self, worker: WorkerAddress) -> Connection:
        key = worker.incarnation
        async with self._locks.holding(key):
            connection = self._connections.get(key)
            if connection is None or connection.closed:
                connection, _ = await Connection.open(
                    worker, self._model, tables=False, timeout_s=self._timeout_s
                )
                self._connections[key] = connection
            if timer := self._idle.pop(key, None):
                timer.cancel()
            self._idle[key] = asyncio.get_running_loop().call_later(IDLE_S, self._forget, key)
            return connection

    def _forget(self, key: str) -> None:
        self._idle.pop(key, None)
        if connection := self._connections.pop(key, None):
            task = asyncio.ensure_future(connection.close())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
