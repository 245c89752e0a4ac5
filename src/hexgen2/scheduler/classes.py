"""Request classes routed differently, where that serves more: split, solve, and check with the cost model.

A linear program gives every class its own shares of the routes. It counts a group as if classes took turns on
it, which is roughly what they do to each other. Whether the result is better is not left to it: every group's
rate is worked out again for the mixture of requests that it would get, and what the plan then carries is
compared with what it carries when all requests are routed alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hexgen2.cost import capacity, goodput
from hexgen2.cost.moments import Moments
from hexgen2.cost.queues import prompt_queue
from hexgen2.cost.replica import Compiled
from hexgen2.scheduler.class_program import Way, solve, way_groups, way_seconds
from hexgen2.scheduler.evaluate import Evaluator, Option
from hexgen2.scheduler.layouts import layout_of
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.restore import restored
from hexgen2.specs.classes import RequestClass
from hexgen2.specs.plan import ClassRouting, Plan, Role, Route
from hexgen2.specs.workload import FloatArray, IntArray, Lengths

WORTHWHILE = 0.03
"""Part of the objective that classes must gain to be in a plan. They make it harder to read, and in simulation
smaller gains are not found again for certain."""
PROMPT_CUT, OUTPUT_CUT = 512, 128
"""Tokens that tell heavy from light prompts and answers in HexGen's workloads."""
SMALLEST = 0.1
"""Part of the requests that a class has at least, else the median cuts."""
MOST_VARIABLES = 4000
ROUNDS = 2
NEGLIGIBLE = 1e-6
Range = tuple[str, int, int | None]
"""Name, first length, and the length that is too long."""


@dataclass(frozen=True)
class Group:
    """A group of the plan: its role, its layout's coefficients, and how it is used."""

    role: Role
    compiled: Compiled
    rps: float


@dataclass(frozen=True)
class Routing:
    """Requests/s by class and way (C, W), what they sum to, and the largest batch of each group."""

    rates: FloatArray
    value: float
    batches: tuple[int, ...]


@dataclass
class _Figures:
    """Capacities of groups for mixtures of requests, alike groups worked out once."""

    problem: Problem
    known: dict[tuple[Role, int, bytes], tuple[float, int]] = field(default_factory=dict)

    def rate(self, group: Group, weights: FloatArray) -> tuple[float, int]:
        """(requests/s, largest batch) of a group that gets requests with these relative frequencies."""
        key = (group.role, id(group.compiled), np.round(weights / weights.sum(), 9).tobytes())
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._rate(group, Moments.of(self.problem.lengths, weights))
        return found

    def _rate(self, group: Group, moments: Moments) -> tuple[float, int]:
        settings, targets = self.problem.cost.settings, self.problem.targets
        costs, tokens = group.compiled.costs, group.compiled.max_tokens
        if group.role == "prefill":
            prefill = capacity.prefill_capacity(costs, moments, tokens, settings)
            if targets is None or prefill.rps <= 0:
                return prefill.rps, max(1, prefill.max_batch)
            queue = prompt_queue(costs, moments, prefill.batch_requests, settings)
            return goodput.prefill_goodput(queue, prefill.rps, targets.ttft_s), prefill.max_batch
        tpot = None if targets is None else targets.tpot_s
        if group.role == "decode":
            decode = capacity.decode_capacity(costs, moments, tokens, settings, tpot)
            rps = decode.rps if targets is None else goodput.decode_goodput(decode, costs, moments)
            return rps, max(1, decode.max_batch)
        both = capacity.colocated_capacity(costs, moments, tokens, settings, tpot)
        if targets is not None:
            return goodput.colocated_goodput(both, costs, moments, settings, targets), max(1, both.max_batch)
        return both.rps, max(1, both.max_batch)


def with_classes(problem: Problem, plan: Plan) -> Plan:
    """The plan with request classes where they gain at least `WORTHWHILE`; else the plan as it is."""
    ways_at_most = len(plan.role_groups("prefill")) * len(plan.role_groups("decode")) + len(plan.groups)
    if len(plan.groups) < 2 or 2 * ways_at_most > MOST_VARIABLES:
        return plan
    sorted_problem, evaluator, solution = restored(problem, plan)
    options = [option for option in solution.options if option is not None]
    groups = [
        Group(o.role, problem.cost.compiled(layout_of(evaluator.topology, o.template)), o.rps) for o in options
    ]
    ways = _ways(evaluator, options)
    figures = _Figures(sorted_problem)
    best: tuple[tuple[RequestClass, ...], Routing] | None = None
    value = plan.objective.value * (1 + WORTHWHILE)
    for classes in splits(problem.lengths):
        if len(classes) * len(ways) > MOST_VARIABLES:
            continue
        found = routed(figures, groups, ways, classes)
        if found is not None and found.value > value:
            best, value = (classes, found), found.value * (1 + WORTHWHILE)
    return plan if best is None else _applied(plan, ways, *best)


def splits(lengths: Lengths) -> Iterator[tuple[RequestClass, ...]]:
    """Ways to tell the requests apart, the simpler first: by their prompts, then by what they ask for too."""
    prompt = _cut(lengths.inputs, PROMPT_CUT)
    output = _cut(lengths.outputs, OUTPUT_CUT)
    if prompt is None:
        return
    prompts: list[Range] = [("short", 0, prompt), ("long", prompt, None)]
    yield _classes(lengths, [(one, None) for one in prompts])
    if output is not None:
        outputs: list[Range] = [("little", 0, output), ("much", output, None)]
        yield _classes(lengths, [(one, other) for one in prompts for other in outputs])


def members(lengths: Lengths, one: RequestClass) -> FloatArray:
    """(n,) 1 for the requests of a class, 0 for others."""
    inside = lengths.inputs >= one.prompt_from
    inside &= lengths.outputs >= one.output_from
    if one.prompt_to is not None:
        inside &= lengths.inputs < one.prompt_to
    if one.output_to is not None:
        inside &= lengths.outputs < one.output_to
    return inside.astype(np.float64)


def routed(
    figures: _Figures, groups: Sequence[Group], ways: Sequence[Way], classes: Sequence[RequestClass]
) -> Routing | None:
    """The best routing by class that was found, at the value that the cost model confirms for it."""
    lengths = figures.problem.lengths
    inside = np.array([members(lengths, one) for one in classes])
    parts = np.array([one.fraction for one in classes])
    tokens = inside @ lengths.inputs / inside.sum(axis=1)
    # Seconds of each group per request of each class (G, C); infinite where the group cannot hold the class.
    with np.errstate(divide="ignore"):
        seconds = np.array([[1 / np.float64(figures.rate(g, row)[0]) for row in inside] for g in groups])
    scale = max(group.rps for group in groups)
    best: Routing | None = None
    for _ in range(ROUNDS):
        rates = solve(seconds * scale, ways, parts, tokens * scale)
        if rates is None:
            return best
        found, used = _confirmed(figures, groups, ways, inside, tokens, rates * scale)
        if best is None or found.value > best.value:
            best = found
        # Count each group in its present mixture as it was found to be.
        planned = _group_seconds(ways, rates, seconds * scale, len(groups))
        known = (planned > NEGLIGIBLE) & (used > NEGLIGIBLE)
        factor = np.where(known, used / np.maximum(planned, NEGLIGIBLE), 1.0)
        seconds = seconds * factor[:, None]
    return best


def _ways(evaluator: Evaluator, options: Sequence[Option]) -> list[Way]:
    tokens = float(evaluator.problem.lengths.inputs.mean())
    found: list[Way] = []
    for target, option in enumerate(options):
        if option.role == "colocated":
            found.append(Way(None, target))
        if option.role != "decode":
            continue
        for source, other in enumerate(options):
            if other.role != "prefill" or evaluator.route(other, option) <= 0:
                continue
            loads: list[tuple[Hashable, float]] = []
            prompts = 1.0
            for name, busy in evaluator.loads(other, option):
                assert isinstance(name, tuple)
                if name[0] == "prompts":
                    prompts = busy * other.rps
                else:
                    own = (name[0], source, *name[1:]) if name[0] == "gpu_out" else name
                    loads.append((own, busy / tokens))
            found.append(Way(source, target, tuple(loads), prompts))
    return found


def _confirmed(
    figures: _Figures,
    groups: Sequence[Group],
    ways: Sequence[Way],
    inside: FloatArray,
    tokens: FloatArray,
    rates: FloatArray,
) -> tuple[Routing, FloatArray]:
    """(the routing at the total that the fullest group and resource allow, the part of each group (G,) that it
    takes at the rates as given)."""
    # (W, n): how often each of the representative requests goes each way.
    per_request = rates.T @ (inside / inside.sum(axis=1, keepdims=True))
    mixture = np.zeros((len(groups), inside.shape[1]))
    taken = np.zeros(len(groups))
    busy: dict[Hashable, float] = {}
    for w, way in enumerate(ways):
        for group in way_groups(way):
            mixture[group] += per_request[w]
            taken[group] += per_request[w].sum() * (way.prompts if group == way.prefill else 1.0)
        flow = float(rates[:, w] @ tokens)
        for name, per_token in way.per_token:
            busy[name] = busy.get(name, 0.0) + flow * per_token
    used, batches = np.zeros(len(groups)), []
    for place, one in enumerate(groups):
        batch = 1
        if taken[place] > NEGLIGIBLE * rates.sum():
            rate, batch = figures.rate(one, mixture[place])
            used[place] = taken[place] / rate if rate > 0 else np.inf
        batches.append(batch)
    fullest = max(float(used.max()), max(busy.values(), default=0.0))
    value = float(rates.sum()) / fullest if np.isfinite(fullest) and fullest > 0 else 0.0
    return Routing(rates, value, tuple(batches)), used


def _group_seconds(ways: Sequence[Way], rates: FloatArray, seconds: FloatArray, count: int) -> FloatArray:
    """(G,) the part of each group that the program takes it to use."""
    planned = np.zeros(count)
    for c, row in enumerate(rates):
        for w, way in enumerate(ways):
            if row[w] > 0:
                for group, used in zip(way_groups(way), way_seconds(way, seconds, c), strict=True):
                    planned[group] += row[w] * used
    return planned


def _applied(plan: Plan, ways: Sequence[Way], classes: tuple[RequestClass, ...], routing: Routing) -> Plan:
    """The plan with the classes' shares on routes and groups."""
    rates = np.where(routing.rates > NEGLIGIBLE * routing.rates.sum(), routing.rates, 0.0)
    shares = rates / rates.sum(axis=1, keepdims=True)
    ids = [group.id for group in plan.groups]
    by_group: list[dict[str, float]] = [dict.fromkeys((one.name for one in classes), 0.0) for _ in ids]
    by_route: dict[tuple[str, str], dict[str, float]] = {}
    for w, way in enumerate(ways):
        mine = {one.name: float(shares[c, w]) for c, one in enumerate(classes)}
        for group in way_groups(way):
            for name, share in mine.items():
                by_group[group][name] += share
        if way.prefill is not None and any(mine.values()):
            by_route[ids[way.prefill], ids[way.target]] = mine
    nothing = {one.name: 0.0 for one in classes}
    routes = [
        route.model_copy(update={"class_shares": by_route.pop((route.source, route.target), nothing)})
        for route in plan.routes
    ]
    routes += [
        Route(source=source, target=target, share=0.0, rps=0.0, capacity_rps=0.0, class_shares=mine)
        for (source, target), mine in by_route.items()
    ]
    groups = [
        group.model_copy(update={"class_shares": mine, "max_batch": max(group.max_batch, batch)})
        for group, mine, batch in zip(plan.groups, by_group, routing.batches, strict=True)
    ]
    gain = routing.value / plan.objective.value - 1
    return plan.model_copy(
        update={
            "groups": tuple(groups),
            "routes": tuple(routes),
            "classes": classes,
            "class_routing": ClassRouting(throughput_rps=routing.value, gain=gain),
        }
    )


def _cut(lengths: IntArray, usual: int) -> int | None:
    """Where to tell short from long: the usual cut if it leaves `SMALLEST` on both sides, else the median; None
    where nearly all lengths are one."""
    for cut in (usual, int(np.median(lengths)) + 1):
        if SMALLEST <= float((lengths < cut).mean()) <= 1 - SMALLEST:
            return cut
    return None


def _classes(lengths: Lengths, ranges: Sequence[tuple[Range, Range | None]]) -> tuple[RequestClass, ...]:
    found: list[RequestClass] = []
    for (name, low, high), output in ranges:
        what, start, end = output or ("", 0, None)
        one = RequestClass(
            name=f"{name}-{what}" if output else name,
            prompt_from=low,
            prompt_to=high,
            output_from=start,
            output_to=end,
            fraction=1.0,
        )
        part = float(members(lengths, one).mean())
        if part > 0:
            found.append(one.model_copy(update={"fraction": part}))
    return tuple(found)
