"""The memory behind the live page: a reading every second, and what follows from it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping

import aiohttp

from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.kv_totals import KvTotals, kv_transfer_totals
from hexgen2.coordinator.live.events import (
    EventLog,
    Told,
    changes,
    dark_nodes,
    groups_by_node,
    node_changes,
    turns,
)
from hexgen2.coordinator.live.history import History, Sample
from hexgen2.coordinator.live.reading import SAMPLES, read
from hexgen2.coordinator.metrics import Metrics
from hexgen2.coordinator.watches import going_on
from hexgen2.specs.plan import Plan

EVERY_S, MOST_OF_TIME = 1.0, 0.01
"""Seconds between two looks, and the part of its time that the event loop may spend on them: fleets of many
hundred routes are looked at less often."""
WATCHED_S = 15.0
"""Seconds after the last look at the page in which the engines are asked for their KV transfers."""
KV_EVERY_S, KV_SPAN_S = 2.0, 30.0


class Live:
    """Looks at the metrics once a second, which costs a millisecond or two. The engines are asked for the KV
    bytes that they received only while somebody looks.

    ``plan`` says what is served, where that is known: the coordinator itself knows engines and shares only.
    """

    def __init__(self, fleet: Fleet, metrics: Metrics, config: Callable[[], CoordinatorConfig]) -> None:
        self.fleet = fleet
        self.history = History()
        self.events = EventLog()
        self.plan: Callable[[], Plan | None] = lambda: None
        self.began = time.time()
        self._metrics = metrics
        self._config = config
        self._seen = config()
        self._lives: dict[str, int] = {}
        self._nodes: tuple[Plan | None, Mapping[str, frozenset[str]]] = (None, {})  # of the plan seen last
        self._dark: frozenset[str] = frozenset()
        self._looked_s = float("-inf")
        self._asked_s = float("-inf")
        self._kv: deque[tuple[float, Mapping[str, KvTotals]]] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def config(self) -> CoordinatorConfig:
        """What is served now."""
        return self._config()

    def tell(self, text: str) -> None:
        """An event that somebody else knows of: a decision of the controller."""
        last = self.history.last
        self.events.add(Told("plan", text), (last.seq if last else 0) + 1, time.time())

    def looked(self) -> None:
        """Somebody is looking."""
        self._looked_s = time.monotonic()

    def start(self, session: aiohttp.ClientSession) -> None:
        """Look from now on, until `stop`; ``session`` asks the engines."""
        self.began = time.time()
        self.sample()
        self._task = asyncio.create_task(self._run(session), name="live")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None

    def sample(self) -> Sample:
        """Look once."""
        now, at = time.monotonic(), time.time()
        reading, before = read(self._metrics.some(SAMPLES), now), self.history.reading
        sample = self.history.add(reading, at)
        engines, config = self.fleet.engines, self._config()
        found: list[Told] = []
        if config is not self._seen:
            found += turns(self._seen, config)
            self._seen = config
        if before is not None:
            reasons = {group: engine.reason for group, engine in engines.items()}
            new = {group: engine.lives - self._lives.get(group, 0) for group, engine in engines.items()}
            found += changes(before, reading, reasons, new)
        dark = dark_nodes(self._groups_by_node(), reading.up)
        found += node_changes(self._dark, dark)
        self._dark = dark
        self._lives = {group: engine.lives for group, engine in engines.items()}
        for told in found:
            self.events.add(told, sample.seq, at)
        return sample

    def _groups_by_node(self) -> Mapping[str, frozenset[str]]:
        plan = self.plan()
        if plan is not self._nodes[0]:
            self._nodes = (plan, {} if plan is None else groups_by_node(plan))
        return self._nodes[1]

    def kv_bytes_per_s(self) -> dict[str, float]:
        """KV cache bytes/s that each group received over the last `KV_SPAN_S`; nothing while nobody looks."""
        if len(self._kv) < 2:
            return {}
        (first_s, first), (last_s, last) = self._kv[0], self._kv[-1]
        none = KvTotals()
        grown = {group: total.bytes - first.get(group, none).bytes for group, total in last.items()}
        return {group: max(0.0, bytes_) / (last_s - first_s) for group, bytes_ in grown.items()}

    async def _run(self, session: aiohttp.ClientSession) -> None:
        took = 0.0
        while True:
            await asyncio.sleep(max(EVERY_S, took / MOST_OF_TIME))
            with going_on("live page"):
                began = time.perf_counter()
                self.sample()
                took = time.perf_counter() - began
                await self._ask(session)

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        """Ask the engines for their KV transfers while somebody looks."""
        now = time.monotonic()
        if now - self._looked_s > WATCHED_S:
            self._kv.clear()
            return
        if now - self._asked_s < KV_EVERY_S:
            return
        self._asked_s = now
        urls = {engine.id: engine.endpoint.url for engine in self.fleet.engines.values() if engine.up}
        self._kv.append((now, await kv_transfer_totals(urls, session, timeout_s=1.0)))
        while len(self._kv) > 2 and self._kv[1][0] <= now - KV_SPAN_S:
            self._kv.popleft()
