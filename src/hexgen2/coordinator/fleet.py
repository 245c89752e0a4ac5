"""The engines together: which paths are up, the choice of one, and the places that requests hold."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Protocol

from hexgen2.coordinator.breaker import Breaker, BreakerSettings
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import EngineFailure, no_path
from hexgen2.coordinator.prefixes import PrefixIndex
from hexgen2.specs.classes import RequestSize
from hexgen2.specs.places import prompts_at_most
from hexgen2.specs.routing import ClassRouter, Path, SmoothRouter

log = logging.getLogger(__name__)

_UNKNOWN = RequestSize()


@dataclass(frozen=True)
class Want:
    """What a request asks of a path.

    `one_engine`: it must not be split: colocated engines serve it, or else decode engines alone. `size` decides
    its class, and so the shares that count. `prefix`: its prompt's first blocks. `weight`: the places that it
    takes, by its length. `priority`: vLLM's, lower first. `long`: it waits with the long ones.
    """

    one_engine: bool = False
    size: RequestSize = _UNKNOWN
    prefix: tuple[int, ...] = ()
    weight: float = 1.0
    priority: int = 0
    long: bool = False


class Place:
    """What a request holds at the engine that answers it, from before its first leg to its end."""

    def __init__(self, fleet: Fleet, path: Path, weight: float) -> None:
        self.path = path
        self._fleet = fleet
        # A long prompt must not wait for an empty engine.
        self._most = weight
        self._take()

    def _take(self) -> None:
        self._target = self._fleet.engines[self.path.target]
        self._since, self._computed_at = time.monotonic(), 0.0
        self._taken = min(self._most, max(1.0, self._target.places / 4))
        self._target.placed += self._taken
        self._held = [self._fleet.engines[group] for group in self.path.groups]
        for engine in self._held:
            engine.hold()

    def computed(self) -> None:
        """Its first leg is over."""
        self._computed_at = time.monotonic()
        self._target.ahead.computed(self._computed_at - self._since)

    def fetched(self) -> None:
        """The answer has begun: the engine that computed the prompt is not needed any more."""
        while len(self._held) > 1:
            self._held.pop(0).release()

    def move(self, path: Path) -> None:
        """Go to another path; nobody waits for a place in the middle of a request."""
        self.leave()
        self.path = path
        self._take()

    def leave(self) -> None:
        self._target.placed -= self._taken
        if self._target.placed < 1e-6:
            self._target.placed = 0.0  # sums of thirds must not leave a rest
        self._taken = 0.0
        if self._computed_at:
            self._target.ahead.answered(time.monotonic() - self._computed_at)
            self._computed_at = 0.0
        for engine in self._held:
            engine.release()
        self._held = []


class Watcher(Protocol):
    """Who is told of the engines."""

    def engine_down(self, engine: Engine, reason: str, silent: bool) -> None:
        """It went down, or what it works on must end: see `Fleet.mark_down`."""
        ...

    def fleet_changed(self) -> None:
        """Engines have come or gone, up or down."""
        ...


class Fleet:
    """All engines, and three choices: the plan's paths, colocated engines alone, decode engines alone."""

    def __init__(self, config: CoordinatorConfig) -> None:
        limits = config.limits
        self.engines: dict[str, Engine] = {}
        self.breakers: dict[str, Breaker] = {}
        self._path_breakers: dict[Path, Breaker] = {}
        self._breaker = BreakerSettings(
            limits.breaker_failures, limits.breaker_open_s, limits.breaker_max_open_s
        )
        self._prefers = limits.affinity_slack > 0
        self._engine_wait_s = limits.engine_wait_s
        self._came_up = asyncio.Event()
        self.prefixes = PrefixIndex(self.engines)
        self.watchers: list[Watcher] = []
        self.on_change: Callable[[], None] = lambda: None
        """Called when places may have come free, or engines have come or gone."""
        self.update(config)

    def meet(self, config: CoordinatorConfig) -> list[Engine]:
        """Take in the engines of a config that are new, without using them yet; which they are. One that is
        down may be another process at another address by now; ValueError where one that is up has moved.
        """
        limits = config.limits
        new: list[Engine] = []
        for endpoint in config.engines:
            known = self.engines.get(endpoint.group_id)
            if known is not None and known.endpoint.url == endpoint.url:
                continue
            if known is not None and known.up:
                raise ValueError(f"engine {endpoint.group_id} is at {known.endpoint.url}; name a new one anew")
            made = Engine(endpoint, limits.capacity_factor, limits.kv_full)
            made.lives = 0 if known is None else known.lives
            new.append(made)
        self.engines |= {engine.id: engine for engine in new}
        self.breakers |= {engine.id: Breaker(self._breaker) for engine in new}
        return new

    def update(self, config: CoordinatorConfig) -> None:
        """Choose by this config from now on. Engines that it does not name are retired: they get nothing new,
        and `forget` drops them."""
        self.meet(config)
        limits, named = config.limits, {endpoint.group_id for endpoint in config.engines}
        for endpoint in config.engines:
            self.engines[endpoint.group_id].become(endpoint)
        for group, engine in self.engines.items():
            if group not in named:
                engine.retired = True
        self.by_class = bool(config.classes)
        colocated = [
            Path(None, e.group_id, e.share, e.class_shares) for e in config.engines if e.role == "colocated"
        ]
        pairs = [Path(route.prefill, route.decode, route.share, route.class_shares) for route in config.routes]
        most = prompts_at_most(pairs, {group: engine.batch for group, engine in self.engines.items()})
        for group, engine in self.engines.items():
            engine.ahead.most = most.get(group, 0)
        by_decode: dict[str, float] = {}
        for route in config.routes:
            by_decode[route.decode] = by_decode.get(route.decode, 0.0) + route.share
        bounds = (limits.load_correction, limits.affinity_slack)
        self.planned = ClassRouter([*pairs, *colocated], bounds[0], config.classes, bounds[1])
        self._whole = SmoothRouter(colocated, *bounds)
        self._decode_alone = SmoothRouter(
            [Path(None, group, share) for group, share in by_decode.items()], *bounds
        )
        routers = (self.planned, self._whole, self._decode_alone)
        for path in {path for router in routers for path in router.paths}:
            self._path_breakers.setdefault(path, Breaker(self._breaker))
        self._tell_waiting()
        self._changed()

    def _changed(self) -> None:
        for watcher in self.watchers:
            watcher.fleet_changed()
        self.on_change()

    def forget(self, group: str) -> None:
        """Drop a retired engine."""
        assert self.engines[group].retired, "the plan still names it"
        del self.engines[group], self.breakers[group]
        for path in [path for path in self._path_breakers if group in path.groups]:
            del self._path_breakers[path]
        self._changed()

    # Choice

    def lane(self, want: Want) -> Hashable:
        """Requests of one lane have the same paths to choose from."""
        return self._routers(want)

    def place(self, want: Want) -> Place | None:
        """A place for a new request; None where it must wait for one. ApiError where nothing is up and nothing
        may come up soon."""
        found = self._candidates(want, ())
        if found is None:
            if self._may_come_up(want):
                return None
            raise no_path()
        router, _, free = found
        path = self._pick(router, free, want)
        return None if path is None else Place(self, path, want.weight)

    def patience_s(self, want: Want) -> float | None:
        """How long a request may wait for engines, where none that may serve it are up; None where some are."""
        up = any(self.is_up(path) for router in self._routers(want) for path in router.paths)
        return None if up else self._engine_wait_s

    def _may_come_up(self, want: Want) -> bool:
        now = time.monotonic()
        come = {
            name
            for name, engine in self.engines.items()
            if engine.up or engine.may_come_up(now, self._engine_wait_s)
        }
        return any(come.issuperset(path.groups) for router in self._routers(want) for path in router.paths)

    def returns(self, group: str, returns: bool) -> None:
        """Whoever runs an engine that is down says whether it is being started again."""
        self.engines[group].returning = returns
        self._changed()

    def choose(self, want: Want | None = None, avoid: Collection[Path] = ()) -> Path | None:
        """A path whose engines are all up, better with a free place than without; None where there is none.

        Paths in `avoid` (they failed this request already) are taken only where nothing else is left.
        """
        want = want or Want()
        found = self._candidates(want, avoid)
        if found is None:
            return None
        router, allowed, free = found
        return self._pick(router, free or allowed, want)

    def _routers(self, want: Want) -> tuple[SmoothRouter, ...]:
        """Whose paths the request may take: the next one's only where none of the first one's is up."""
        return (self._whole, self._decode_alone) if want.one_engine else self.planned.routers(want.size)

    def _candidates(
        self, want: Want, avoid: Collection[Path]
    ) -> tuple[SmoothRouter, set[Path], set[Path]] | None:
        """(router, its paths that are up, those of them that have a free place); None where nothing is up.

        Paths in doubt are left out as long as others are left. Breakers and earlier failures steer, they never
        refuse: a path that is up beats no path.
        """
        now, best = time.monotonic(), 4
        down, full, doubted = set(), set(), set()
        for name, engine in self.engines.items():
            if not engine.up:
                down.add(name)
            if engine.full:
                full.add(name)
            if not self.breakers[name].allows(now):
                doubted.add(name)
        found: tuple[SmoothRouter, list[Path]] | None = None
        for router in self._routers(want):
            for path in router.paths:
                if not down.isdisjoint(path.groups):
                    continue
                trusted = doubted.isdisjoint(path.groups) and self._path_breakers[path].allows(now)
                doubt = (0 if trusted else 2) + (path in avoid)
                if doubt < best:
                    best, found = doubt, (router, [path])
                elif doubt == best and found is not None and found[0] is router:
                    found[1].append(path)
        if found is None:
            return None
        router, allowed = found
        return router, set(allowed), {path for path in allowed if path.target not in full}

    def _pick(self, router: SmoothRouter, paths: Collection[Path], want: Want) -> Path | None:
        load = {engine.id: engine.load for engine in self.engines.values()}
        preferred = self.prefixes.preferred(want.prefix, paths) if self._prefers and want.prefix else ()
        path = router.choose(paths.__contains__, load, preferred, self.is_up)
        if path is not None:
            now = time.monotonic()
            for breaker in self._breakers_of(path):
                breaker.sent(now)
            self.prefixes.note(want.prefix, path)
        return path

    @property
    def unanswered(self) -> int:
        """Requests in their first leg, and those whose second one waits for a slot."""
        return sum(
            engine.in_flight if engine.endpoint.role == "prefill" else engine.gate.waiting
            for engine in self.engines.values()
        )

    def any_engine(self) -> Engine | None:
        """The least busy engine that is up, for questions that any of them can answer."""
        known = (engine for engine in self.engines.values() if engine.up and not engine.retired)
        return min(known, key=lambda engine: engine.in_flight, default=None)

    # Outcomes

    def _breakers_of(self, path: Path) -> list[Breaker]:
        # A request may outlive an engine that was on its path: one that is gone has no breaker.
        found = [self.breakers.get(group) for group in path.groups] + [self._path_breakers.get(path)]
        return [breaker for breaker in found if breaker is not None]

    def succeeded(self, path: Path) -> None:
        """A request went well along a path: whoever was on trial has passed."""
        for breaker in self._breakers_of(path):
            breaker.succeeded()

    def failed(self, failure: EngineFailure, path: Path) -> None:
        """Count a failure against whoever is to blame for it."""
        if failure.kind == "http_5xx" and path.prefill is not None and failure.group_id == path.target:
            # It may be that the KV cache could not be fetched, through no fault of the decode engine's: a dead
            # prefill engine must not take the whole fleet of decode engines with it.
            breaker = self._path_breakers.get(path)
        else:
            breaker = self.breakers.get(failure.group_id)
        if breaker is not None and breaker.failed(time.monotonic()):
            log.warning("%s failed repeatedly and is left alone for a while: %s", path, failure.detail)

    def forgive(self, group: str) -> None:
        """Close an engine's breakers: it is another process from now on."""
        self.breakers[group].succeeded()
        for path, breaker in self._path_breakers.items():
            if group in path.groups:
                breaker.succeeded()

    # State

    def is_up(self, path: Path) -> bool:
        return all(self.engines[group].up for group in path.groups)

    @property
    def paths_up(self) -> int:
        return sum(map(self.is_up, self.planned.paths))

    @property
    def full(self) -> bool:
        """Whether no engine that answers has a free place, some being up."""
        answering = [
            e for e in self.engines.values() if e.up and not e.retired and e.endpoint.role != "prefill"
        ]
        return bool(answering) and all(engine.full for engine in answering)

    def mark_up(self, engine: Engine) -> None:
        engine.missed_polls = 0
        if not engine.up:
            log.info("engine %s is up", engine.id)
            engine.up, engine.reason, engine.down_since = True, "healthy", None
            engine.returning = None
            self._tell_waiting()
            self._changed()

    def _tell_waiting(self) -> None:
        """Who waits for a path looks again."""
        self._came_up.set()
        self._came_up = asyncio.Event()

    async def wait_for_change(self, within_s: float) -> bool:
        """Wait until some engine comes up, or other paths are planned; False where neither happens within the
        time."""
        try:
            async with asyncio.timeout(within_s):
                await self._came_up.wait()
        except TimeoutError:
            return False
        return True

    def mark_down(self, engine: Engine, reason: str, silent: bool = False) -> None:
        """Take an engine out and end what it was working on.

        Who fetches a KV cache from an engine that has gone `silent` would wait as long; from one that is dead
        the fetch fails by itself.
        """
        was_up = engine.up
        if was_up:
            log.warning("engine %s is down: %s", engine.id, reason)
            engine.down_since = time.monotonic()
            engine.lives += 1
        engine.downs += 1
        engine.up, engine.reason, engine.kv_used = False, reason, 0.0
        engine.end_work(reason, silent)
        for watcher in self.watchers if self.engines.get(engine.id) is engine else ():
            watcher.engine_down(engine, reason, silent)
        if was_up:
            self._changed()

    def note_kv(self, engine: Engine, used: float) -> None:
        """How much of an engine's KV cache is in use, by its own word."""
        was_full, engine.kv_used = engine.kv_is_full, used
        if was_full and not engine.kv_is_full:
            engine.gate.refill()
            self.on_change()
