"""One engine as the coordinator knows it right now."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from hexgen2.coordinator.config import EngineEndpoint
from hexgen2.coordinator.errors import EngineFailure, FailureKind
from hexgen2.coordinator.gate import Gate
from hexgen2.specs.places import PromptsAhead, places
from hexgen2.specs.routing import engine_load

# Where the plan does not say how much a group runs at once.
_NOMINAL_BATCH = 256


class Call(Protocol):
    """A request that an engine works on."""

    def expire(self, kind: FailureKind, group_id: str, detail: str) -> None:
        """End it now, as this engine's failure, for this reason."""
        ...


@dataclass(eq=False)
class Engine:
    """One engine's state. `calls` is what it works on, so that all of it can be ended at once; `feeding` is
    what other engines work on that may still be fetching a KV cache from it.

    `placed` is what is bound for it or runs there: requests that it answers count from before their first leg,
    long prompts for more than one; at a prefill engine `in_flight` says the same. `held` counts the requests
    that cannot do without it: all it answers, and those whose KV cache it computes until that is fetched.
    """

    endpoint: EngineEndpoint
    places_factor: float = 1.0
    kv_full: float = 1.0
    up: bool = False
    reason: str = "not yet asked"
    in_flight: int = 0
    placed: float = 0.0
    kv_used: float = 0.0  # of its KV cache's blocks, by its own last word
    missed_polls: int = 0
    heard_at: float = 0.0  # event-loop time at which an answer's bytes last came
    max_model_len: int | None = None
    held: int = 0
    retired: bool = False  # it gets no new requests
    ahead: PromptsAhead = field(default_factory=PromptsAhead)
    calls: set[Call] = field(default_factory=set)
    feeding: set[Call] = field(default_factory=set)
    down_since: float | None = None  # monotonic; None while it is up, and before it first was
    born: float = field(default_factory=time.monotonic)
    returning: bool | None = None  # it is being started again; False: it will not be; None: nobody said
    lives: int = 0  # how often it has gone down: what it held in memory belongs to one life
    downs: int = 0  # how often it was said to be down, also while it was: what it was asked before is void
    gate: Gate = field(init=False)
    free: asyncio.Event = field(default_factory=asyncio.Event)  # set while nothing holds it

    def __post_init__(self) -> None:
        self.gate = Gate(self.batch, lambda: not self.kv_is_full)
        self.free.set()

    def become(self, endpoint: EngineEndpoint) -> None:
        """Take another role, share or batch; what runs on it goes on."""
        self.endpoint, self.retired = endpoint, False
        self.gate.limit = self.batch
        self.gate.refill()

    def hold(self) -> None:
        self.held += 1
        self.free.clear()

    def release(self) -> None:
        self.held -= 1
        if not self.held:
            self.free.set()

    @property
    def id(self) -> str:
        return self.endpoint.group_id

    @property
    def batch(self) -> int:
        """Requests that it is meant to run at once."""
        return self.endpoint.max_batch or _NOMINAL_BATCH

    @property
    def places(self) -> int:
        """Requests that may be bound for it at once."""
        return places(self.batch, self.places_factor) + self.ahead.number(self.batch)

    @property
    def kv_is_full(self) -> bool:
        return self.kv_used >= self.kv_full

    @property
    def full(self) -> bool:
        """Whether it should get no further request now."""
        return self.placed >= self.places or (self.kv_is_full and self.placed > 0)

    @property
    def load(self) -> float:
        return engine_load(max(self.placed, self.in_flight), self.batch, self.kv_used)

    def down_for(self, now: float) -> float:
        """Seconds since it went down; 0 while it is up."""
        return 0.0 if self.down_since is None else now - self.down_since

    def may_come_up(self, now: float, grace_s: float) -> bool:
        """Whether it is worth waiting for: it is being started again, or it has been down for no longer than
        the grace and nobody said that it stays down."""
        if self.returning is not None:
            return self.returning
        return now - (self.born if self.down_since is None else self.down_since) < grace_s

    def end_work(self, reason: str, fetches: bool) -> None:
        """End what it works on and what waits for it: a frozen engine would never do so itself. With `fetches`
        also what waits for a KV cache of it."""
        for call in list(self.calls):
            call.expire("down", self.id, reason)
        for call in list(self.feeding) if fetches else ():
            call.expire("down", self.id, f"{reason}, while its KV cache was to be fetched")
        self.gate.fail_waiting(lambda: EngineFailure("down", self.id, reason))
