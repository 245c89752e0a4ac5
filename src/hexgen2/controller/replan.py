"""Other plans than the one that runs: searched from it, and from nothing, with as many groups kept as can be.

The scheduler's search works on counts of GPUs by node. Here its groups are put on real GPUs so that whatever
runs already, runs on: a group of the same layout keeps its GPUs and its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hexgen2.controller.carry import Carrier, Seat, Seats, Setting
from hexgen2.controller.remedies import MayFlip
from hexgen2.controller.rollout import units
from hexgen2.scheduler import Problem
from hexgen2.scheduler.evaluate import Evaluator, Option, best_rate
from hexgen2.scheduler.hexgen2 import evaluator_for, finished, moves_from, search
from hexgen2.scheduler.layouts import StageTemplate, Template
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.plan_build import ROLE_LETTER
from hexgen2.scheduler.problem import Budget, Clock
from hexgen2.scheduler.refine import climb
from hexgen2.scheduler.solution import Cell, Solution, assess
from hexgen2.scheduler.topology import Topology, canonical, members_of
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Slo, Stage

WARM_STATES = 4000
"""States that the search from the running plan values at most."""


@dataclass(frozen=True)
class Effort:
    """Seconds for the search from the running plan, and for the one from nothing."""

    warm_s: float = 3.0
    fresh_s: float = 3.0


def reduced(cluster: Cluster, usable: Collection[str]) -> Cluster | None:
    """The cluster with the usable GPUs alone (by id); None where there are none.

    A node that keeps some of its GPUs counts fewer of them: which ones is for `dealt` to know.
    """
    counts = Counter(cluster.gpus[cluster.gpu_by_id[gpu].index].node for gpu in usable)
    nodes = tuple(
        node.model_copy(update={"count": counts[place]})
        for place, node in enumerate(cluster.nodes)
        if counts[place]
    )
    if not nodes:
        return None
    return Cluster(name=cluster.name, nodes=nodes, network=cluster.network, inline_types=cluster.inline_types)


def plans(
    setting: Setting,
    seats: Seats,
    usable: Collection[str],
    may_flip: MayFlip,
    clock: Clock,
    effort: Effort | None = None,
    taken: Collection[str] = (),
) -> Iterator[Seats]:
    """Seats of other plans over the usable GPUs: each better state on the climb from ``seats``, then the plan
    of a search from nothing.

    ``seats``: the groups that run, all on usable GPUs. ``taken``: names that new groups must not have. Groups
    that nothing takes the GPUs of run on.
    """
    effort = effort or Effort()
    cluster = reduced(setting.cluster, usable)
    if cluster is None:
        return
    problem = Problem(
        cluster=canonical(cluster),
        workload="observed",
        lengths=setting.lengths,
        cost=setting.cost,
        engine=setting.engine,
        objective="throughput" if setting.tpot_s is None else "goodput",
        slo=Slo(tpot_s=setting.tpot_s),
    )
    evaluator = Evaluator(problem, best_rate)
    node = {found.name: place for place, found in enumerate(problem.cluster.nodes)}
    start = assess(evaluator, [_cell(seat, node) for seat in seats], coupled=True)
    assert start is not None, "no lower limit was given"
    path: list[Solution] = []

    def recorded(solution: Solution) -> Iterator[Cells]:
        path.append(solution)
        yield from moves_from(solution)

    budget = Budget(clock, effort.warm_s, states=WARM_STATES)
    last = climb(evaluator, start, recorded, budget, set(), coupled=True)
    found = [(one, evaluator) for one in (*path, last) if one is not start]
    with suppress(InputError):  # no replica fits on what is left
        fresh, budget = evaluator_for(problem), Budget(clock, effort.fresh_s)
        found.append(finished(fresh, search(problem, fresh, 0, budget), (), budget))
    if not found:
        return
    for solution, judge in found:
        yield dealt(judge.topology, solution, seats, usable, may_flip, taken)
    # Engines that take another role keep the batch they were started for: started anew they may do better.
    solution, judge = found[-1]
    yield dealt(judge.topology, solution, seats, usable, lambda seat, role: seat.role == role, taken)


def dealt(
    topology: Topology,
    solution: Solution,
    seats: Seats,
    usable: Collection[str],
    may_flip: MayFlip,
    taken: Collection[str] = (),
) -> Seats:
    """A solution's groups on real GPUs.

    A group of the layout of one that runs is that one: first in the same role, then where the engine can take
    the other role. The rest are new, on the GPUs that are left, under names that nobody had.
    """
    node = {found.name: place for place, found in enumerate(topology.cluster.nodes)}
    running = {seat.id: (seat, _template(seat.stages, node)) for seat in seats}
    wanted = [
        (cell, option)
        for cell, option in zip(solution.cells, solution.options, strict=True)
        if option is not None
    ]
    kept: list[Seat] = []
    fresh: list[tuple[Cell, Option]] = []
    for in_role in (True, False):
        fresh = []
        for cell, option in wanted:
            match = next(
                (
                    seat
                    for seat, template in running.values()
                    if template == option.template
                    and (seat.role == cell.role if in_role else may_flip(seat, cell.role))
                ),
                None,
            )
            if match is None:
                fresh.append((cell, option))
            else:
                del running[match.id]
                kept.append(match.as_role(cell.role))
        wanted = fresh
    busy = {gpu for seat in kept for gpu in seat.gpus}
    # GPUs of groups that would have to end come last: a group that fits on free ones disturbs nobody.
    ending = {gpu for seat, _ in running.values() for gpu in seat.gpus}
    free: dict[str, list[str]] = {name: [] for name in node}
    for gpu in sorted(usable, key=lambda gpu: (gpu in ending, _place(gpu))):
        if gpu not in busy:
            free[_place(gpu)[0]].append(gpu)
    names = _names({seat.id for seat in seats} | set(taken))
    new = tuple(
        Seat(next(names[ROLE_LETTER[cell.role]]), cell.role, _stages(topology, option.template, free))
        for cell, option in fresh
    )
    used = busy | {gpu for seat in new for gpu in seat.gpus}
    untouched = [seat for seat, _ in running.values() if not seat.gpus & used]
    order = {seat.id: place for place, seat in enumerate(seats)}
    return (*sorted((*kept, *untouched), key=lambda seat: order[seat.id]), *new)


def trimmed(carrier: Carrier, old: Seats, new: Seats, least_rps: float) -> Seats:
    """``new`` without the changes that do not pay: a change is undone where it adds less than ``least_rps``
    requests/s for each group that it starts.

    A change is a set of groups that end and start on the same GPUs. The least useful is undone first.
    """
    current = new
    while True:
        rate = carrier.best(current).rps
        best: Seats | None = None
        best_net = 0.0
        for unit in units(old, current):
            names = {seat.id for seat in unit.starts}
            undone = (*(seat for seat in current if seat.id not in names), *unit.stops)
            net = carrier.best(undone).rps - rate + least_rps * len(unit.starts)
            if unit.starts and net > best_net:
                best, best_net = undone, net
        if best is None:
            return current
        current = best


def _cell(seat: Seat, node: Mapping[str, int]) -> Cell:
    template = _template(seat.stages, node)
    counts: Counter[int] = Counter()
    for stage in template:
        counts.update(dict(stage.members))
    return Cell(members_of(dict(counts)), seat.role, template)


def _template(stages: Sequence[Stage], node: Mapping[str, int]) -> Template:
    """Stages by node."""
    return tuple(
        StageTemplate(members_of(dict(Counter(node[_place(gpu)[0]] for gpu in stage.gpus))), stage.layers)
        for stage in stages
    )


def _stages(topology: Topology, template: Template, free: dict[str, list[str]]) -> tuple[Stage, ...]:
    """The template on the first free GPUs of its nodes, which are taken."""
    stages: list[Stage] = []
    first_layer = 0
    for stage in template:
        gpus: list[str] = []
        for place, count in stage.members:
            pool = free[topology.cluster.nodes[place].name]
            gpus += pool[:count]
            del pool[:count]
        stages.append(Stage(gpus=tuple(gpus), tp=len(gpus), first_layer=first_layer, layers=stage.layers))
        first_layer += stage.layers
    return tuple(stages)


def _names(known: Collection[str]) -> dict[str, Iterator[str]]:
    """For each letter, names beyond all known ones: an engine's name is never used again."""

    def beyond(letter: str) -> Iterator[str]:
        numbers = [int(name[1:]) for name in known if name[1:].isdigit()]
        number = max(numbers, default=-1)
        while True:
            number += 1
            yield f"{letter}{number}"

    return {letter: beyond(letter) for letter in ROLE_LETTER.values()}


def _place(gpu: str) -> tuple[str, int]:
    """A GPU's node and its number on it."""
    name, _, number = gpu.rpartition("/")
    return name, int(number)
