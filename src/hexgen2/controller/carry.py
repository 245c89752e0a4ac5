"""What groups that run can carry under an observed load: the cost model and the program of the routes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from hexgen2.cost import CostModel, capacity, transfer
from hexgen2.cost.layout import PlacedStage, Placement, shape
from hexgen2.cost.moments import Moments
from hexgen2.scheduler.engines import EngineProfile
from hexgen2.scheduler.routes import Loads, RouteProgram, balanced, best_shares
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Plan, Role, Stage
from hexgen2.specs.workload import Lengths

NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Seat:
    """A group with a role. ``started_batch``: the sequences at once that its engine was started for (None: it
    is not started yet, and may have as many as fit)."""

    id: str
    role: Role
    stages: tuple[Stage, ...]
    started_batch: int | None = None

    @property
    def tps(self) -> tuple[int, ...]:
        return tuple(stage.tp for stage in self.stages)

    @property
    def gpus(self) -> frozenset[str]:
        return frozenset(gpu for stage in self.stages for gpu in stage.gpus)

    def as_role(self, role: Role) -> Seat:
        """The same group in another role."""
        return replace(self, role=role)


Seats = tuple[Seat, ...]


@dataclass(frozen=True)
class Setting:
    """What is the same for every way to use the cluster: the engines' rules, the load, the measured links.

    ``tpot_s``: the target for the time per output token, where the objective has one. ``links``: bytes/s that
    groups were seen to receive KV caches at; where that is less than planned, it counts.
    """

    cluster: Cluster
    cost: CostModel
    engine: EngineProfile
    lengths: Lengths
    tpot_s: float | None = None
    links: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def moments(self) -> Moments:
        return self.cost.moments(self.lengths)


@dataclass(frozen=True)
class Worth:
    """Requests/s of a group in its role, and the sequences that it runs at once then."""

    rps: float
    batch: int


@dataclass(frozen=True)
class Carried:
    """The most that seats carry, in requests/s: in all, by route, by colocated group; and each group's worth.

    ``route_limits``: what each route could carry alone. ``scarce``: groups whose capacity limits the whole.
    """

    rps: float
    routes: Mapping[tuple[str, str], float]
    colocated: Mapping[str, float]
    worths: Mapping[str, Worth]
    route_limits: Mapping[tuple[str, str], float]
    scarce: tuple[str, ...]

    @property
    def shares(self) -> Shares:
        """Parts of all requests by path: (prefill, decode), or (None, colocated)."""
        if self.rps <= 0:
            return {}
        found: Shares = {pair: rps / self.rps for pair, rps in self.routes.items()}
        found |= {(None, group): rps / self.rps for group, rps in self.colocated.items()}
        return {path: share for path, share in found.items() if share > NEGLIGIBLE}


Shares = dict[tuple[str | None, str], float]


def seats_of(plan: Plan, started: Mapping[str, int] | None = None) -> Seats:
    """The plan's groups as they run; ``started``: batches that engines were started for, the plan's where not
    named."""
    known = started or {}
    return tuple(
        Seat(group.id, group.role, group.stages, known.get(group.id, group.max_batch)) for group in plan.groups
    )


def shares_of(plan: Plan) -> Shares:
    """The plan's shares by path."""
    found: Shares = {(route.source, route.target): route.share for route in plan.routes if route.share > 0}
    found |= {(None, group.id): group.share for group in plan.role_groups("colocated") if group.share > 0}
    return found


class Carrier:
    """Values seats in one setting. It holds caches and nothing else."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._worths: dict[tuple[tuple[Stage, ...], Role, int | None], Worth] = {}
        self._placements: dict[tuple[Stage, ...], Placement] = {}
        self._loads: dict[tuple[tuple[Stage, ...], tuple[Stage, ...]], Loads] = {}

    def worth(self, seat: Seat) -> Worth:
        """What a group can do by itself; 0 requests/s where it holds no replica or the engine cannot run it."""
        key = (seat.stages, seat.role, seat.started_batch)
        found = self._worths.get(key)
        if found is None:
            found = self._worths[key] = self._value(seat)
        return found

    def ceiling(self, seats: Seats) -> float:
        """Requests/s with a network that carries anything."""
        totals: dict[Role, float] = {"prefill": 0.0, "decode": 0.0, "colocated": 0.0}
        for seat in seats:
            totals[seat.role] += self.worth(seat).rps
        return min(totals["prefill"], totals["decode"]) + totals["colocated"]

    def best(self, seats: Seats) -> Carried:
        """The best routes over these seats."""
        able = [seat for seat in seats if self.worth(seat).rps > 0]
        prefill = [seat for seat in able if seat.role == "prefill"]
        decode = [seat for seat in able if seat.role == "decode"]
        pairs = [(i, j) for i in range(len(prefill)) for j in range(len(decode))]
        pairs = [(i, j) for i, j in pairs if self._can_talk(prefill[i], decode[j])]
        loads = [self._route(prefill[i], decode[j]) for i, j in pairs]
        program = RouteProgram(
            prefill=np.array([self.worth(seat).rps for seat in prefill]),
            decode=np.array([self.worth(seat).rps for seat in decode]),
            sources=np.array([i for i, _ in pairs], dtype=np.int64),
            targets=np.array([j for _, j in pairs], dtype=np.int64),
            loads=loads,
        )
        solved = best_shares(program)
        flows = balanced(program, solved.value)
        names = [(prefill[i].id, decode[j].id) for i, j in pairs]
        colocated = {seat.id: self.worth(seat).rps for seat in able if seat.role == "colocated"}
        total = solved.value + sum(colocated.values())
        priced = zip((*prefill, *decode), (*solved.prefill_price, *solved.decode_price), strict=True)
        return Carried(
            rps=total,
            routes={
                name: float(flow)
                for name, flow in zip(names, flows, strict=True)
                if flow > NEGLIGIBLE * max(total, 1e-300)
            },
            colocated=colocated,
            worths={seat.id: self.worth(seat) for seat in seats},
            route_limits={
                name: 1 / max(seconds for _, seconds in load)
                for name, load in zip(names, loads, strict=True)
                if load
            },
            scarce=tuple(seat.id for seat, price in priced if price > 1e-6),
        )

    def with_shares(self, seats: Seats, shares: Shares) -> float:
        """The most requests/s when paths keep these shares; those over groups that are missing from ``seats``
        give theirs to the others in proportion, as the coordinator does."""
        by_id = {seat.id: seat for seat in seats}
        live = {
            path: share
            for path, share in shares.items()
            if all(end is None or end in by_id for end in path) and share > 0
        }
        total = sum(live.values())
        if total <= 0:
            return 0.0
        busy: dict[object, float] = {}  # seconds of each group and resource that a mean request takes
        for (source, target), share in live.items():
            part = share / total
            for end in (source, target):
                if end is not None:
                    rps = self.worth(by_id[end]).rps
                    busy[end] = busy.get(end, 0.0) + (part / rps if rps > 0 else float("inf"))
            if source is not None:
                if not self._can_talk(by_id[source], by_id[target]):
                    return 0.0
                for resource, seconds in self._route(by_id[source], by_id[target]):
                    busy[resource] = busy.get(resource, 0.0) + part * seconds
        return 1 / max(busy.values())

    def _value(self, seat: Seat) -> Worth:
        setting = self.setting
        if setting.engine.group_rule(seat.role, seat.tps) is not None:
            return Worth(0.0, 1)
        layout = shape(setting.cluster, self._placement(seat))
        of, settings = setting.cost.compiled(layout), setting.cost.settings
        most = settings.max_batch if seat.started_batch is None else seat.started_batch
        settings = replace(settings, max_batch=min(settings.max_batch, most))
        if seat.role == "prefill":
            prefill = capacity.prefill_capacity(of.costs, setting.moments, of.max_tokens, settings)
            return Worth(prefill.rps, max(1, prefill.max_batch))
        value = capacity.decode_capacity if seat.role == "decode" else capacity.colocated_capacity
        found = value(of.costs, setting.moments, of.max_tokens, settings, setting.tpot_s)
        return Worth(found.rps, max(1, found.max_batch))

    def _placement(self, seat: Seat) -> Placement:
        found = self._placements.get(seat.stages)
        if found is None:
            gpus = self.setting.cluster.gpu_by_id
            found = self._placements[seat.stages] = tuple(
                PlacedStage(tuple(gpus[gpu].index for gpu in stage.gpus), stage.first_layer, stage.layers)
                for stage in seat.stages
            )
        return found

    def _can_talk(self, source: Seat, target: Seat) -> bool:
        return self.setting.engine.route_rule(source.tps, target.tps) is None

    def _route(self, source: Seat, target: Seat) -> Loads:
        """Seconds of each shared resource that a mean request's KV cache takes, by the links as they are."""
        planned = self._planned_loads(source, target)
        seen = self.setting.links.get(target.id)
        if seen is None or not planned:
            return planned
        size = self.setting.moments.input * self.setting.cost.model.kv_bytes_per_token
        slower = max(1.0, size / max(seconds for _, seconds in planned) / seen)
        return tuple((resource, seconds * slower) for resource, seconds in planned)

    def _planned_loads(self, source: Seat, target: Seat) -> Loads:
        key = (source.stages, target.stages)
        found = self._loads.get(key)
        if found is None:
            cluster, cost = self.setting.cluster, self.setting.cost
            sizes = transfer.kv_loads(
                cost.model, self._placement(source), self._placement(target), self.setting.moments.input
            )
            found = self._loads[key] = tuple(
                (resource, size / transfer.capacity(cluster, resource))
                for resource, size in transfer.resources(cluster, sizes).items()
            )
        return found


def live(seats: Iterable[Seat], up: Iterable[str]) -> Seats:
    """The seats whose engines are up."""
    known = frozenset(up)
    return tuple(seat for seat in seats if seat.id in known)
