"""The best plan of a small cluster by looking at every one: the yardstick for the search.

Written apart from the search: it shares the cost model (and the engines' rules) alone, has its own enumeration
of layouts and its own linear program. Its space: groups of any GPUs (idle ones allowed) in any role; stages
with tensor parallelism inside a node, in any order of nodes and of stages inside a node, or one stage over the
whole group; every deal of layers. Of the layouts of a group that load the network alike only the fastest is
kept. Branches whose optimistic completion is no better than the best plan so far are cut.

With a time limit it goes through as many groups and layouts as there is time for, then through the plans made
of those, for which it may take up to `FINISH` of the limit more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import permutations, product

import numpy as np
from scipy.optimize import linprog

from hexgen2.cost import goodput, transfer
from hexgen2.cost.goodput import Targets
from hexgen2.cost.layout import Layout, PlacedStage, Placement, shape
from hexgen2.cost.queues import PromptQueue, prompt_queue
from hexgen2.scheduler.problem import Budget, Problem
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import ROLES, Role

MOST_GPUS = 10
Vector = tuple[int, ...]
"""GPUs of each node."""
_TIE = 1e-9
FINISH = 0.1


@dataclass(frozen=True, slots=True)
class Choice:
    """A group of ``vector`` GPUs in a role: its stages as ((GPUs by node), layers), and what it is worth."""

    vector: Vector
    role: Role
    stages: tuple[tuple[Vector, int], ...]
    rps: float
    max_batch: int
    latency_s: float
    queue: PromptQueue | None = field(default=None, compare=False, repr=False)

    @property
    def tps(self) -> tuple[int, ...]:
        return tuple(sum(part) for part, _ in self.stages)


@dataclass(frozen=True)
class Best:
    """The optimum: its groups and its value in requests/s. Not ``proven`` where time ended the search."""

    choices: tuple[Choice, ...]
    value: float
    proven: bool = True


def optimum(problem: Problem, budget: Budget, disaggregated_only: bool = False) -> Best:
    """The best plan, or with a time limit the best of those looked at.

    InputError for clusters above `MOST_GPUS`, when nothing fits, and when time ends before any plan is seen.
    """
    counts = tuple(node.count for node in problem.cluster.nodes)
    if sum(counts) > MOST_GPUS:
        raise InputError(
            problem.place,
            "nodes",
            f"{sum(counts)} GPUs are too many to look at every plan (at most {MOST_GPUS})",
            "use --solver hexgen2",
        )
    limit_s = budget.limit_s
    search = _Search(problem, counts, budget, disaggregated_only)
    best = search.run()
    if best is None and search.cut_off:
        raise InputError(
            "--time-limit",
            "",
            f"{limit_s:g} s were over before a plan was seen",
            "give more, or use --solver hexgen2",
        )
    if best is None:
        raise InputError(problem.place, "nodes", f"{problem.model.name} fits nowhere", "add GPUs")
    return replace(best, proven=not search.cut_off)


class _Search:
    """Branch and bound over multisets of (GPUs, role), each with its kept layouts."""

    def __init__(self, problem: Problem, counts: Vector, budget: Budget, disaggregated_only: bool) -> None:
        self.problem = problem
        self.counts = counts
        self.budget = budget
        self.best: Best | None = None
        self.cut_off = False
        self.first = np.cumsum([0, *counts[:-1]])
        roles = ROLES[:2] if disaggregated_only else ROLES
        items: list[tuple[Choice, ...]] = []
        for vector in product(*(range(count + 1) for count in counts)):
            if any(vector):
                items += [found for role in roles if (found := _choices(problem, vector, role, budget))]
        self.cut_off = budget.timed_out
        if budget.limit_s is not None:
            budget.limit_s = max(budget.limit_s, budget.spent_s + FINISH * budget.limit_s)
        # The most valuable per GPU first: good plans early cut more later.
        self.items = sorted(items, key=lambda found: -found[0].rps / sum(found[0].vector))
        self.density = self._densities()

    def run(self) -> Best | None:
        self._grow((), 0, self.counts, np.zeros(3))
        return self.best

    def _densities(self) -> dict[Role, np.ndarray]:
        """By role (N,): requests/s that one GPU of a node adds at most; summed they cover a group's rate."""
        found: dict[Role, np.ndarray] = {}
        for role in ROLES:
            mine = [choices[0] for choices in self.items if choices[0].role == role]
            weight = np.full(len(self.counts), 1e-12)
            for choice in mine:
                if sum(1 for count in choice.vector if count) == 1:
                    node = int(np.argmax(choice.vector))
                    weight[node] = max(weight[node], choice.rps / choice.vector[node])
            weight = np.maximum(weight, 0.05 * weight.max())
            scale = max((choice.rps / float(np.dot(choice.vector, weight)) for choice in mine), default=0.0)
            found[role] = scale * weight
        return found

    def _bound(self, left: Vector, sums: np.ndarray) -> float:
        """An optimistic value: min(P, D) ≤ λP + (1 − λ)D for every λ, each GPU left at its best density."""
        rest = np.array(left)
        bounds = []
        for part in np.linspace(0, 1, 11):
            worth = np.maximum(part * self.density["prefill"], (1 - part) * self.density["decode"])
            worth = np.maximum(worth, self.density["colocated"])
            bounds.append(part * sums[0] + (1 - part) * sums[1] + sums[2] + float(rest @ worth))
        return float(min(bounds))

    def _grow(self, taken: tuple[int, ...], start: int, left: Vector, sums: np.ndarray) -> None:
        if taken:
            self._value(taken)
        for item in range(start, len(self.items)):
            if self._over():
                return
            choice = self.items[item][0]
            rest = tuple(a - b for a, b in zip(left, choice.vector, strict=True))
            if min(rest) < 0:
                continue
            grown = sums.copy()
            grown[ROLES.index(choice.role)] += choice.rps
            if self.best is not None and self._bound(rest, grown) <= self.best.value * (1 + _TIE):
                continue
            self._grow((*taken, item), item, rest, grown)

    def _value(self, taken: tuple[int, ...]) -> None:
        """The best layouts of these groups: combinations in turn, those that cannot win left out."""
        for choices in product(*(self.items[item] for item in taken)):
            if self._over():
                return
            rates = {role: sum(c.rps for c in choices if c.role == role) for role in ROLES}
            ceiling = min(rates["prefill"], rates["decode"]) + rates["colocated"]
            if ceiling <= 0 or (self.best is not None and ceiling <= self.best.value * (1 + _TIE)):
                continue
            value = self._flow(choices) + rates["colocated"]
            if value > 0 and (self.best is None or value > self.best.value * (1 + _TIE)):
                self.best = Best(choices, value)
                self.budget.report("exhaustive", value)

    def _over(self) -> bool:
        """Whether time ends the search here; what is left then was not looked at."""
        self.cut_off = self.cut_off or self.budget.timed_out
        return self.budget.timed_out

    def _flow(self, choices: tuple[Choice, ...]) -> float:
        """Requests/s over the routes, all sharing links, NICs and ports: one linear program."""
        prefill = [place for place, choice in enumerate(choices) if choice.role == "prefill"]
        decode = [place for place, choice in enumerate(choices) if choice.role == "decode"]
        problem, targets = self.problem, self.problem.targets
        pairs = [
            (i, j)
            for i in prefill
            for j in decode
            if problem.engine.route_rule(choices[i].tps, choices[j].tps) is None
        ]
        if not pairs:
            return 0.0
        placements = self.place(choices)
        tokens = float(problem.lengths.inputs.mean())
        rows: dict[object, dict[int, float]] = {}
        for column, (i, j) in enumerate(pairs):
            rows.setdefault(("group", j), {})[column] = 1 / choices[j].rps
            loads = transfer.kv_loads(problem.model, placements[i], placements[j], tokens)
            room = 1.0 if targets is None else goodput.LINK_LOAD
            longest = 0.0
            for resource, size in transfer.resources(problem.cluster, loads).items():
                seconds = size / transfer.capacity(problem.cluster, resource)
                longest = max(longest, seconds)
                rows.setdefault(resource, {})[column] = seconds / room
            rate, queue = choices[i].rps, choices[i].queue
            if targets is not None and queue is not None:
                after = goodput.handover(longest, tokens, choices[j].latency_s, problem.cost.settings)
                rate = max(1e-9 * rate, goodput.prefill_goodput(queue, rate, targets.ttft_s, after))
            rows.setdefault(("group", i), {})[column] = 1 / rate
        scale = max(choice.rps for choice in choices)
        matrix = np.zeros((len(rows), len(pairs)))
        for place, row in enumerate(rows.values()):
            for column, value in row.items():
                matrix[place, column] = value * scale
        solved = linprog(-np.ones(len(pairs)), A_ub=matrix, b_ub=np.ones(len(rows)), method="highs")
        return -float(solved.fun) * scale

    def place(self, choices: tuple[Choice, ...]) -> list[Placement]:
        """Real GPUs for the groups, each node's in turn."""
        free = [int(index) for index in self.first]
        placements: list[Placement] = []
        for choice in choices:
            stages: list[PlacedStage] = []
            layer = 0
            for part, layers in choice.stages:
                gpus: list[int] = []
                for node, count in enumerate(part):
                    gpus += range(free[node], free[node] + count)
                    free[node] += count
                stages.append(PlacedStage(tuple(gpus), layer, layers))
                layer += layers
            placements.append(tuple(stages))
        return placements


def _choices(problem: Problem, vector: Vector, role: Role, budget: Budget) -> tuple[Choice, ...]:
    """A group's layouts in a role, the fastest of each way to load the network, best first; those that there is
    time for."""
    kept: dict[object, Choice] = {}
    counts = [node.count for node in problem.cluster.nodes]
    first = np.cumsum([0, *counts[:-1]])
    for chain in _chains(problem, vector):
        tps = tuple(sum(part) for part in chain)
        if problem.engine.group_rule(role, tps) is not None:
            continue
        if any(problem.engine.stage_rule([count for count in part if count]) for part in chain):
            continue
        for layers in _compositions(problem.model.layers, len(chain)):
            if budget.timed_out:
                break
            free = [int(index) for index in first]
            placement: list[PlacedStage] = []
            layer = 0
            for part, count in zip(chain, layers, strict=True):
                gpus: list[int] = []
                for node, taken in enumerate(part):
                    gpus += range(free[node], free[node] + taken)
                    free[node] += taken
                placement.append(PlacedStage(tuple(gpus), layer, count))
                layer += count
            layout = shape(problem.cluster, tuple(placement))
            stages = tuple(zip(chain, layers, strict=True))
            choice = _rated(problem, layout, Choice(vector, role, stages, 0.0, 1, 0.0))
            key = _footprint(problem, choice)
            best = kept[key].rps if key in kept else 0.0
            if choice.rps > best and problem.targets is not None:
                choice = _timely(problem, problem.targets, layout, choice)
            if choice.rps > best:
                kept[key] = choice
    return tuple(sorted(kept.values(), key=lambda choice: -choice.rps))


def _rated(problem: Problem, layout: Layout, choice: Choice) -> Choice:
    """The choice with its rate, without waiting."""
    cost, lengths = problem.cost, problem.lengths
    tpot = None if problem.targets is None else problem.targets.tpot_s
    if choice.role == "prefill":
        prefill = cost.prefill_capacity(layout, lengths)
        return replace(
            choice, rps=prefill.rps, max_batch=max(1, prefill.batch_requests), latency_s=prefill.latency_s
        )
    found = (
        cost.decode_capacity(layout, lengths, tpot)
        if choice.role == "decode"
        else cost.colocated_capacity(layout, lengths, tpot)
    )
    return replace(choice, rps=found.rps, max_batch=max(1, found.max_batch), latency_s=found.tpot_s)


def _timely(problem: Problem, targets: Targets, layout: Layout, choice: Choice) -> Choice:
    """The choice at its rate within latency targets."""
    cost, moments = problem.cost, problem.cost.moments(problem.lengths)
    costs, settings = cost.compiled(layout).costs, problem.cost.settings
    if choice.role == "prefill":
        batch = cost.prefill_capacity(layout, moments).batch_requests
        queue = prompt_queue(costs, moments, batch, settings)
        return replace(choice, rps=goodput.prefill_goodput(queue, choice.rps, targets.ttft_s), queue=queue)
    if choice.role == "decode":
        decode = cost.decode_capacity(layout, moments, targets.tpot_s)
        return replace(choice, rps=goodput.decode_goodput(decode, costs, moments))
    both = cost.colocated_capacity(layout, moments, targets.tpot_s)
    return replace(choice, rps=goodput.colocated_goodput(both, costs, moments, settings, targets))


def _footprint(problem: Problem, choice: Choice) -> object:
    """What decides how a group's transfers load links and NICs, and which groups it may talk to.

    Colocated groups send nothing. Inside one node only the TP sizes matter: they set how often the KV cache is
    copied (beyond ``kv_shards``) and which partners the engine allows.
    """
    if choice.role == "colocated":
        return ()
    tps = tuple(sorted(set(choice.tps)))
    if sum(1 for count in choice.vector if count) == 1:
        return tps if problem.engine.tp_divides or max(tps) > problem.model.kv_shards else ()
    merged: list[tuple[Vector, int]] = []
    for part, layers in choice.stages:
        where = tuple(int(count > 0) for count in part)
        if merged and merged[-1][0] == where:
            merged[-1] = (where, merged[-1][1] + layers)
        else:
            merged.append((where, layers))
    return (tps, tuple(merged))


def _chains(problem: Problem, vector: Vector) -> Iterator[tuple[Vector, ...]]:
    """Ordered stages: nodes in every order, each one's GPUs cut into TP groups in every order; or one."""
    model = problem.model
    sizes = [tp for tp in range(1, sum(vector) + 1) if model.heads % tp == 0]
    if model.mla is None:
        sizes = [tp for tp in sizes if model.kv_heads % tp == 0 or tp % model.kv_heads == 0]
    nodes = [node for node, count in enumerate(vector) if count]

    def one(node: int, tp: int) -> Vector:
        return tuple(tp if place == node else 0 for place in range(len(vector)))

    if len(nodes) > 1 and sum(vector) in sizes:
        yield (vector,)
    for order in permutations(nodes):
        cuts = [list(_sums(vector[node], sizes)) for node in order]
        for chosen in product(*cuts):
            yield tuple(one(node, tp) for node, cut in zip(order, chosen, strict=True) for tp in cut)


def _sums(total: int, sizes: list[int]) -> Iterator[tuple[int, ...]]:
    """Every ordered way to write ``total`` as a sum of the sizes."""
    if total == 0:
        yield ()
    for size in sizes:
        if size <= total:
            for rest in _sums(total - size, sizes):
                yield (size, *rest)


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to give ``parts`` stages at least one of ``total`` layers each."""
    if parts == 1:
        yield (total,)
        return
    for layers in range(1, total - parts + 2):
        for rest in _compositions(total - layers, parts - 1):
            yield (layers, *rest)
