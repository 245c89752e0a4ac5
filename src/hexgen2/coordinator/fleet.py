"""The engines as the coordinator knows them right now, and the choice of a path among those that are up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from hexgen2.coordinator.breaker import Breaker, BreakerSettings
from hexgen2.coordinator.config import CoordinatorConfig, EngineEndpoint
from hexgen2.coordinator.errors import EngineFailure, FailureKind
from hexgen2.specs.classes import RequestSize
from hexgen2.specs.routing import ClassRouter, Path, SmoothRouter

log = logging.getLogger(__name__)

# Where the plan does not say how much a group runs at once.
_NOMINAL_BATCH = 256
_UNKNOWN = RequestSize()


class Call(Protocol):
    """A request that an engine works on."""

    def expire(self, kind: FailureKind, group_id: str, detail: str) -> None:
        """End it now, as this engine's failure, for this reason."""
        ...


@dataclass(eq=False)
class Engine:
    """One engine's state. `calls` is what it works on, so that all of it can be ended at once; `feeding` is
    what other engines work on that may still be fetching a KV cache from it.
    """

    endpoint: EngineEndpoint
    up: bool = False
    reason: str = "not yet asked"
    in_flight: int = 0
    missed_polls: int = 0
    heard_at: float = 0.0  # event-loop time at which an answer's bytes last came
    max_model_len: int | None = None
    calls: set[Call] = field(default_factory=set)
    feeding: set[Call] = field(default_factory=set)
    down_since: float | None = None  # monotonic; None while it is up, and before it first was
    lives: int = 0  # how often it has gone down: what it held in memory belongs to one life

    def down_for(self, now: float) -> float:
        """Seconds since it went down; 0 while it is up."""
        return 0.0 if self.down_since is None else now - self.down_since

    @property
    def id(self) -> str:
        return self.endpoint.group_id

    @property
    def load(self) -> float:
        """Requests in flight over those that it is meant to run at once."""
        return self.in_flight / (self.endpoint.max_batch or max(1.0, self.endpoint.share * _NOMINAL_BATCH))


class Fleet:
    """All engines, and three choices: the plan's paths, colocated engines alone, decode engines alone."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.engines = {endpoint.group_id: Engine(endpoint) for endpoint in config.engines}
        colocated = [
            Path(None, e.group_id, e.share, e.class_shares) for e in config.engines if e.role == "colocated"
        ]
        pairs = [Path(route.prefill, route.decode, route.share, route.class_shares) for route in config.routes]
        by_decode: dict[str, float] = {}
        for route in config.routes:
            by_decode[route.decode] = by_decode.get(route.decode, 0.0) + route.share
        self._came_up = asyncio.Event()
        limits = config.limits
        settings = BreakerSettings(limits.breaker_failures, limits.breaker_open_s, limits.breaker_max_open_s)
        self.breakers = {group: Breaker(settings) for group in self.engines}
        bound = limits.load_correction
        self.planned = ClassRouter([*pairs, *colocated], bound, config.classes)
        self._whole = SmoothRouter(colocated, bound)
        self._decode_alone = SmoothRouter(
            [Path(None, group, share) for group, share in by_decode.items()], bound
        )
        routers = (self.planned, self._whole, self._decode_alone)
        self._path_breakers = {path: Breaker(settings) for router in routers for path in router.paths}

    def choose(
        self, one_engine: bool = False, avoid: Collection[Path] = (), size: RequestSize = _UNKNOWN
    ) -> Path | None:
        """A path whose engines are all up, by the shares of the request's class; None where there is none.

        With `one_engine` the request must not be split: colocated engines serve it, or else decode engines
        alone. Paths in `avoid` (they failed this request already) are taken only where nothing else is
        left.
        """
        routers = (self._whole, self._decode_alone) if one_engine else self.planned.routers(size)
        load = {engine.id: engine.load for engine in self.engines.values()}
        now = time.monotonic()
        usable = {path for router in routers for path in router.paths if self.is_up(path)}
        # Breakers and earlier failures steer, they never refuse: a path that is up beats no path.
        trusted = {path for path in usable if all(breaker.allows(now) for breaker in self._breakers_of(path))}
        for allowed in (trusted.difference(avoid), trusted, usable.difference(avoid), usable):
            for router in routers:
                path = router.choose(allowed.__contains__, load) if allowed else None
                if path is not None:
                    for breaker in self._breakers_of(path):
                        breaker.sent(now)
                    return path
        return None

    def _breakers_of(self, path: Path) -> list[Breaker]:
        return [self.breakers[group] for group in path.groups] + [self._path_breakers[path]]

    def succeeded(self, path: Path) -> None:
        """A request went well along a path: whoever was on trial has passed."""
        for breaker in self._breakers_of(path):
            breaker.succeeded()

    def forgive(self, group: str) -> None:
        """Close an engine's breakers: it is another process from now on."""
        self.breakers[group].succeeded()
        for path, breaker in self._path_breakers.items():
            if group in path.groups:
                breaker.succeeded()

    def failed(self, failure: EngineFailure, path: Path) -> None:
        """Count a failure against whoever is to blame for it."""
        if failure.kind == "http_5xx" and path.prefill is not None and failure.group_id == path.target:
            # It may be that the KV cache could not be fetched, through no fault of the decode engine's: a dead
            # prefill engine must not take the whole fleet of decode engines with it.
            breaker = self._path_breakers[path]
        else:
            breaker = self.breakers[failure.group_id]
        if breaker.failed(time.monotonic()):
            log.warning("%s failed repeatedly and is left alone for a while: %s", path, failure.detail)

    def is_up(self, path: Path) -> bool:
        return all(self.engines[group].up for group in path.groups)

    def capacity(self) -> int:
        """Requests that the engines which answer (all but prefill engines) are meant to run at once, those
        up.
        """
        return sum(
            engine.endpoint.max_batch or _NOMINAL_BATCH
            for engine in self.engines.values()
            if engine.up and engine.endpoint.role != "prefill"
        )

    @property
    def paths_up(self) -> int:
        return sum(map(self.is_up, self.planned.paths))

    def mark_up(self, engine: Engine) -> None:
        engine.missed_polls = 0
        if not engine.up:
            log.info("engine %s is up", engine.id)
            engine.up, engine.reason, engine.down_since = True, "healthy", None
            self._came_up.set()
            self._came_up = asyncio.Event()

    async def wait_for_change(self, within_s: float) -> bool:
        """Wait until some engine comes up; False where none does within the time."""
        try:
            async with asyncio.timeout(within_s):
                await self._came_up.wait()
        except TimeoutError:
            return False
        return True

    def mark_down(self, engine: Engine, reason: str, silent: bool = False) -> None:
        """Take an engine out and end what it was working on: a frozen engine would never do so itself.

        Who fetches a KV cache from an engine that has gone `silent` would wait as long; from one that is dead
        the fetch fails by itself.
        """
        if engine.up:
            log.warning("engine %s is down: %s", engine.id, reason)
            engine.down_since = time.monotonic()
            engine.lives += 1
        engine.up, engine.reason = False, reason
        for call in list(engine.calls):
            call.expire("down", engine.id, reason)
        for call in list(engine.feeding) if silent else ():
            call.expire("down", engine.id, f"{reason}, while its KV cache was to be fetched")
