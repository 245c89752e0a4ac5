"""What the serving of one request asks of whoever knows all of them.

Where one process serves, that is the fleet and the door themselves, in it. Where several do, one process owns
both, and the others ask it (`workers/`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from hexgen2.coordinator.admission import Admission
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import EngineFailure, out_of_service
from hexgen2.coordinator.fleet import Fleet, Place, Want
from hexgen2.coordinator.traffic import Served
from hexgen2.specs.routing import Path


class Held(Protocol):
    """A request's place."""

    @property
    def path(self) -> Path:
        """The way that it goes."""
        ...

    def fetched(self) -> None:
        """Its answer has begun: the engine that computed the prompt is not needed any more."""
        ...


class Desk(Protocol):
    """Who gives places, and is told what became of them."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """All engines, as they are now."""
        ...

    @property
    def by_class(self) -> bool:
        """Whether it matters how long a prompt is."""
        ...

    async def knock(self, key: str) -> None:
        """ApiError where a request of this key has no chance now."""
        ...

    def admitted(self, key: str, want: Want) -> AbstractAsyncContextManager[Held]:
        """Hold a place inside the block, after waiting for one; ApiError where none comes free in time."""
        ...

    async def elsewhere(self, held: Held, want: Want, avoid: Collection[Path]) -> bool:
        """Move a request whose path failed to another one; False where none is up."""
        ...

    async def wait_for_change(self, within_s: float) -> bool:
        """Wait until some engine comes up; False where none does within the time."""
        ...

    def turn(self, held: Held, priority: int) -> AbstractAsyncContextManager[None]:
        """A second leg's slot at the decode engine inside the block; EngineFailure where that goes down, or is
        gone already."""
        ...

    def leg(self, engine: Engine, by: int) -> None:
        """A leg on this engine begins (1) or ends (-1)."""
        ...

    def succeeded(self, path: Path) -> None:
        """A request went well along this path."""
        ...

    def failed(self, failure: EngineFailure, path: Path) -> None:
        """A request failed along this path."""
        ...

    def mark_down(self, engine: Engine, reason: str) -> None:
        """This engine cannot be reached."""
        ...


class LocalDesk:
    """The fleet and the door in this process."""

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self._fleet = fleet
        self._admission = admission
        self.mark_down = fleet.mark_down
        self.succeeded, self.failed = fleet.succeeded, fleet.failed
        self.wait_for_change = fleet.wait_for_change
        self.admitted = admission.admitted

    @property
    def engines(self) -> Mapping[str, Engine]:
        return self._fleet.engines

    @property
    def by_class(self) -> bool:
        return self._fleet.by_class

    def refuse_early(self, key: str) -> None:
        """`knock`, at once."""
        self._admission.refuse_early(key)

    async def knock(self, key: str) -> None:
        self.refuse_early(key)

    async def elsewhere(self, held: Held, want: Want, avoid: Collection[Path]) -> bool:
        return self.move(held, want, avoid)

    def move(self, held: Held, want: Want, avoid: Collection[Path]) -> bool:
        """`elsewhere`, at once."""
        assert isinstance(held, Place)
        path = self._fleet.choose(want, avoid)
        if path is not None:
            held.move(path)
        return path is not None

    def turn(self, held: Held, priority: int) -> AbstractAsyncContextManager[None]:
        assert isinstance(held, Place)
        engine = self._fleet.engines.get(held.path.target)
        if engine is None:
            raise out_of_service(held.path.target)
        held.computed()
        return engine.gate.turn(priority)

    def leg(self, engine: Engine, by: int) -> None:
        engine.in_flight += by


Counted = Literal[
    "requests",
    "output_tokens",
    "routed",
    "one_engine",
    "without_kv",
    "failures",
    "retries",
    "migrations",
    "replays",
    "broken",
    "cancelled",
]
Timed = Literal["ttft", "tpot", "e2e", "leg_seconds"]


class Meter(Protocol):
    """Who counts what happens."""

    def count(self, what: Counted, *labels: str, by: float = 1.0) -> None:
        """So many more."""
        ...

    def time(self, what: Timed, seconds: float, *labels: str) -> None:
        """It took so long."""
        ...

    def serving(self, requests: int) -> None:
        """So many generation requests are being served now."""
        ...

    @property
    def listens(self) -> bool:
        """Whether somebody wants to hear of each request."""
        ...

    def arrived(self) -> None:
        """A generation request came."""
        ...

    def served(self, request: Served) -> None:
        """A request was answered whole."""
        ...
