"""What the plan that runs can carry now, what the best could, and the remedies in between. Pure.

The work of seconds, so it is one function of values that can be pickled: the controller has it done in another
process, and the coordinator's event loop goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from hexgen2.controller.carry import Carrier, Seat, Seats, Setting, Shares, live
from hexgen2.controller.remedies import Candidate, Demand, candidate, flipped, flips, starts
from hexgen2.controller.replan import Effort, plans, trimmed
from hexgen2.scheduler.problem import Clock
from hexgen2.specs.plan import Role

MOST_WAYS = 12
"""Ways to use the cluster that are worked out to the order in which their groups start."""


BOTH: frozenset[Role] = frozenset({"prefill", "decode"})
"""The roles between which an engine can change that hands KV caches on in both directions."""


@dataclass(frozen=True)
class Flipping:
    """Which engines can take another role without being started anew, by the roles they may take."""

    roles: Mapping[str, frozenset[Role]] = field(default_factory=dict)

    def __call__(self, seat: Seat, role: Role) -> bool:
        return role in self.roles.get(seat.id, frozenset())


@dataclass(frozen=True)
class Task:
    """The question. ``seats``: all groups of the plan; ``up``: those that answer; ``shares``: the plan's, by
    path; ``usable``: GPUs to plan with. ``taken``: names that engines have had."""

    setting: Setting
    seats: Seats
    shares: Shares
    up: frozenset[str]
    usable: frozenset[str]
    demand: Demand
    flipping: Flipping = field(default_factory=Flipping)
    effort: Effort = field(default_factory=Effort)
    min_serving: float = 0.5
    search: bool = True
    taken: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Assessment:
    """The answer. Requests/s: ``now_rps`` with the plan's shares over the groups that are up, ``best_rps`` of
    the best seats found, restarts aside. ``candidates`` in rising cost; ``wall_s``: what it took."""

    now_rps: float
    best_rps: float
    demand: Demand
    candidates: tuple[Candidate, ...]
    wall_s: float

    @property
    def now_served(self) -> float:
        """Requests over the horizon when nothing is done."""
        return self.demand.served(self.now_rps)


def assess(task: Task, clock: Clock = time.perf_counter) -> Assessment:
    """Work out every remedy that none beats at its price or less. Without ``task.search`` only those that start
    nothing."""
    began = clock()
    carrier = Carrier(task.setting)
    seats = live(task.seats, task.up)
    ways = [seats, *flips(carrier, seats, task.flipping, task.demand.rps)]
    if task.search:
        ways += _other_plans(task, carrier, seats, max(carrier.best(way).rps for way in ways), clock)
    rates = [carrier.best(way).rps for way in ways]
    chosen = _undominated([(starts(seats, way), flipped(seats, way)) for way in ways], rates)
    found = [candidate(carrier, seats, ways[place], task.demand, task.min_serving) for place in chosen]
    return Assessment(
        now_rps=carrier.with_shares(seats, task.shares),
        best_rps=max(rates),
        demand=task.demand,
        candidates=tuple(sorted(found, key=lambda one: one.cost)),
        wall_s=clock() - began,
    )


def _other_plans(task: Task, carrier: Carrier, seats: Seats, rps: float, clock: Clock) -> list[Seats]:
    """Plans that start groups: the steps of the climb from the running plan, the plan of a search from nothing,
    and the last ones without what does not pay."""
    found = list(
        plans(
            task.setting,
            tuple(seat for seat in seats if seat.gpus <= task.usable),
            task.usable,
            task.flipping,
            clock,
            task.effort,
            task.taken | {seat.id for seat in task.seats},
        )
    )
    least_rps = _least_gain(task.demand, rps / max(1, len(seats)))
    return found + [trimmed(carrier, seats, new, least_rps) for new in found[-3:]]


def _undominated(prices: list[tuple[int, int]], rates: list[float]) -> list[int]:
    """Places of the ways that carry more than all that cost less or the same; at most `MOST_WAYS`, the first
    and the last among them."""
    order = sorted(range(len(prices)), key=lambda place: (prices[place], -rates[place]))
    kept: list[int] = []
    for place in order:
        if not kept or rates[place] > rates[kept[-1]] * (1 + 1e-6):
            kept.append(place)
    if len(kept) <= MOST_WAYS:
        return kept
    steps = [round(step * (len(kept) - 1) / (MOST_WAYS - 1)) for step in range(MOST_WAYS)]
    return [kept[step] for step in steps]


def _least_gain(demand: Demand, group_rps: float) -> float:
    """Requests/s that a started group must add for its restart to pay: what a group (of ``group_rps``) does not
    serve while it is started, spread over the rest of the horizon."""
    return group_rps * demand.restart_s / max(demand.horizon_s - demand.restart_s, 1e-9)
