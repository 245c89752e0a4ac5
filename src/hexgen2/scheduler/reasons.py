"""Why a plan is as it is: what every group's runner-up would do, and what each engine rule costs.

Both are found by solving the routes again, with one group's role or layout replaced, or with the layouts that
groups would take were a rule lifted. The groups stay as they are, so a rule may cost more than is said here;
`explain --why` plans anew without it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from hexgen2.scheduler.engines import ANY, PROFILES, RULES, TP_DIVIDES, EngineProfile
from hexgen2.scheduler.evaluate import Evaluator, Option, best_rate
from hexgen2.scheduler.layouts import StageTemplate, Template
from hexgen2.scheduler.routes import best_shares
from hexgen2.scheduler.solution import Solution, assemble, assess, route_program
from hexgen2.scheduler.topology import Topology
from hexgen2.specs.plan import ROLES, Rejection, Role

WORTH_TELLING = 0.01
"""Part of a rate that a forbidden layout must gain to be told of."""
MOST_ROUTES = 1000
"""Routes up to which they are solved again for every runner-up: with 25,000 (1,024 GPUs) that takes 45 s."""


@dataclass(frozen=True)
class Alternative:
    """Another role or layout of one group, and the whole plan's requests/s with it."""

    role: Role
    template: Template
    value: float


def runners_up(evaluator: Evaluator, solution: Solution, cells: Sequence[int]) -> list[tuple[Alternative, ...]]:
    """For each cell its best other layout in its role and its best layout in another role, the better first.

    A layout is another one when it has other stages, not only other layers on the same ones. Of cells that are
    alike, in themselves and in their routes, one is tried for all. Nothing for more than `MOST_ROUTES` routes.
    """
    if solution.flow.network.routes.size > MOST_ROUTES:
        return [()] * len(cells)
    known: dict[Hashable, tuple[Alternative, ...]] = {}
    found: list[tuple[Alternative, ...]] = []
    for cell in cells:
        key = _likeness(evaluator, solution, cell)
        if key not in known:
            known[key] = _runners_up(evaluator, solution, cell)
        found.append(known[key])
    return found


def rule_costs(evaluator: Evaluator, solution: Solution, value: float) -> tuple[Rejection, ...]:
    """What the same groups, serving ``value``, would serve were a rule lifted, or with a stronger engine."""
    if solution.flow.network.routes.size > MOST_ROUTES:
        return ()
    engine = evaluator.problem.engine
    costly = [rule for rule in RULES if rule in engine.rules and _may_cost(evaluator, solution, rule)]
    gains = {rule: _value_under(evaluator, solution, engine.without(rule)) / value - 1 for rule in costly}
    found = [(rule, f"{RULES[rule]}: without that rule", gain) for rule, gain in gains.items()]
    for other in stronger(engine) if costly else ():
        # A solver's own rule for layouts may choose worse where it may choose more: the best of all counts.
        ways = [gain for rule, gain in gains.items() if rule not in other.rules]
        gain = max([_value_under(evaluator, solution, other) / value - 1, *ways])
        found.append((engine.name, f"with --engine {other.name}", gain))
    return tuple(
        Rejection(rule=rule, detail=f"{words} the same groups would serve {gain:.1%} more", gain=gain)
        for rule, words, gain in found
        if gain > WORTH_TELLING
    )


def stronger(engine: EngineProfile) -> list[EngineProfile]:
    """Profiles of a runtime that has some of the engine's rules and no others."""
    return [other for other in PROFILES.values() if other != ANY and other.rules < engine.rules]


def template_words(topology: Topology, template: Template) -> str:
    """'2 stages of 4×H100-80G-SXM TP4, 40 layers each → 1×L40, 10 layers': like ones in a row are said once."""
    parts: list[str] = []
    stages = [(_stage_words(topology, stage), stage.layers) for stage in template]
    for words, run in groupby(stages, key=lambda stage: stage[0]):
        layers = sorted(count for _, count in run)
        spread = str(layers[0]) if layers[0] == layers[-1] else f"{layers[0]}-{layers[-1]}"
        if len(template) == 1:
            parts.append(words)
        elif len(layers) == 1:
            parts.append(f"{words}, {spread} layers")
        else:
            parts.append(f"{len(layers)} stages of {words}, {spread} layers each")
    return " → ".join(parts)


def _stage_words(topology: Topology, stage: StageTemplate) -> str:
    kinds: dict[str, int] = {}
    for node, gpus in stage.members:
        kinds[topology.types[node].name] = kinds.get(topology.types[node].name, 0) + gpus
    words = " + ".join(f"{gpus}×{kind}" for kind, gpus in kinds.items())
    return f"{words} TP{stage.tp}" if stage.tp > 1 else words


def _runners_up(evaluator: Evaluator, solution: Solution, cell: int) -> tuple[Alternative, ...]:
    chosen = solution.options[cell]
    assert chosen is not None, "only groups with a layout are asked"
    found = [_tried(evaluator, solution, cell, option) for option in _other_layouts(evaluator, solution, cell)]
    same = max((one for one in found if one.role == chosen.role), key=_value, default=None)
    other = max((one for one in found if one.role != chosen.role), key=_value, default=None)
    return tuple(sorted((one for one in (same, other) if one is not None), key=_value, reverse=True))


def _likeness(evaluator: Evaluator, solution: Solution, cell: int) -> Hashable:
    """Equal for groups of equal GPUs, layout and routes."""
    role, row, option = solution.cells[cell].role, solution.place[cell], solution.options[cell]
    routes = solution.flow.network.routes
    reach = (
        () if role == "colocated" else np.sort(routes[row] if role == "prefill" else routes[:, row]).tobytes()
    )
    return (role, option and _stages(evaluator, option), option and option.rps, reach)


def _may_cost(evaluator: Evaluator, solution: Solution, rule: str) -> bool:
    """Whether lifting a rule can do anything: it forbids a faster layout of a group, or it is about routes."""
    if rule == TP_DIVIDES:
        return solution.flow.network.routes.size > 0
    return any(
        option.forbidden == rule and chosen is not None and option.rps > chosen.rps * (1 + WORTH_TELLING)
        for cell, chosen in zip(solution.cells, solution.options, strict=True)
        for option in evaluator.options(cell.members, cell.role)
    )


def _other_layouts(evaluator: Evaluator, solution: Solution, cell: int) -> Iterator[Option]:
    """The fastest layout with other stages in the cell's role, and the fastest in each other role."""
    members, mine = solution.cells[cell].members, solution.options[cell]
    assert mine is not None, "only groups with a layout are asked"
    for role in ROLES:
        others = [
            option
            for option in evaluator.allowed(members, role)
            if role != mine.role or _stages(evaluator, option) != _stages(evaluator, mine)
        ]
        if others:
            yield best_rate(others)


def _tried(evaluator: Evaluator, solution: Solution, cell: int, option: Option) -> Alternative:
    cells, options = list(solution.cells), list(solution.options)
    cells[cell] = replace(cells[cell], role=option.role, template=option.template)
    options[cell] = option
    return Alternative(option.role, option.template, _valued(evaluator, assemble(evaluator, cells, options)))


def _valued(evaluator: Evaluator, solution: Solution) -> float:
    shares = best_shares(route_program(evaluator, solution))
    return shares.value + float(solution.flow.network.colocated.sum())


def _value_under(evaluator: Evaluator, solution: Solution, engine: EngineProfile) -> float:
    """Requests/s of the same groups in the same roles with the layouts that another engine allows."""
    cells = [replace(cell, template=None) for cell in solution.cells]
    found = assess(evaluator.under(engine), cells, coupled=True)
    assert found is not None, "no lower limit was given"
    return found.value


def _stages(evaluator: Evaluator, option: Option) -> Hashable:
    """The layout's stages by class and number of GPUs, whatever nodes they are of and layers they hold."""
    classes = evaluator.topology.node_class
    return tuple(tuple((int(classes[node]), gpus) for node, gpus in stage.members) for stage in option.template)


def _value(alternative: Alternative) -> float:
    return alternative.value
