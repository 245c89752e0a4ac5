"""The coordinator as a client of its engines: connections, and the watch over the calls that use them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import aiohttp

from hexgen2.coordinator.calls import EngineCall
from hexgen2.coordinator.config import Timeouts
from hexgen2.coordinator.desk import Desk
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import out_of_service
from hexgen2.coordinator.upstream import Pool
from hexgen2.coordinator.watches import going_on

# A process that did nothing for so long, beyond the watch's own pause, was not given the time.
_STALL_S = 1.0


class EngineClient:
    """Connections to the engines, and the watch over the calls that use them.

    Deadlines are not timers: each call notes until when it may wait, and one task looks at all of them
    several times a second. A stream of tokens then costs one assignment per token, not a timer.
    """

    def __init__(self, desk: Desk, timeouts: Timeouts, trust: ssl.SSLContext | None = None) -> None:
        """``trust``: whose certificates of engines are good; None: the system's."""
        self.desk = desk
        self.timeouts = timeouts
        self._trust = trust
        self._pools: dict[str, Pool] = {}  # by the engine's address
        self._probes: aiohttp.ClientSession | None = None
        self.watched: set[EngineCall] = set()
        self._ticked_at = self._stalled_at = 0.0
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        # Health polls set up a connection each: they then also tell whether the engine still accepts any,
        # and do not keep the pool's idle connections alive.
        self._probes = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0, ssl=self._trust or True)
        )
        self._watch = asyncio.create_task(self._watch_calls(), name="engine-call-watch")

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        for pool in self._pools.values():
            pool.close()
        self._pools = {}
        if self._probes is not None:
            await self._probes.close()
        self._watch = self._probes = None

    def pool(self, engine: Engine) -> Pool:
        """The connections to an engine."""
        url = engine.endpoint.url
        if url not in self._pools:
            self._pools[url] = Pool(url, self._trust)
        return self._pools[url]

    @property
    def probes(self) -> aiohttp.ClientSession:
        """For questions about the engine: a connection each."""
        assert self._probes is not None, "the client is not started"
        return self._probes

    def surely_at(self, earliest: float, seen: float) -> float:
        """When something happened, at the earliest, that was looked for from `earliest` on and seen at `seen`
        (event-loop times): then, unless this process stood still in between."""
        stalled = self._stalled_at > earliest or seen - self._ticked_at > _STALL_S
        return earliest if stalled else seen

    def call(self, group_id: str, kv_from: str | None = None) -> EngineCall:
        """A request to an engine, which may have to fetch the prompt's KV cache from `kv_from`."""
        return EngineCall(self, self.engine(group_id), None if kv_from is None else self.engine(kv_from))

    def engine(self, group_id: str) -> Engine:
        """EngineFailure where it was taken out of service: a request may outlive an engine on its path."""
        engine = self.desk.engines.get(group_id)
        if engine is None:
            raise out_of_service(group_id)
        return engine

    async def _watch_calls(self) -> None:
        loop = asyncio.get_running_loop()
        bounds = (self.timeouts.prefill_s, self.timeouts.first_byte_s, self.timeouts.idle_s)
        pause = min(0.25, min(bounds) / 4)
        self._ticked_at = loop.time()
        while True:
            await asyncio.sleep(pause)
            now = loop.time()
            if now - self._ticked_at > _STALL_S:
                self._stalled_at = now
            self._ticked_at = now
            with going_on("watch over calls"):
                self._look(now)

    def _look(self, now: float) -> None:
        """End the calls that wait for too long, and close the connections that are of no more use."""
        for call in list(self.watched):
            if call.deadline is not None and call.deadline < now:
                call.expire("timeout", call.engine.id, f"nothing came for {call.allowed_s:g} s")
        known = {engine.endpoint.url for engine in self.desk.engines.values()}
        for url, pool in list(self._pools.items()):
            pool.close_old(now)
            if url not in known:
                self._pools.pop(url).close()
