"""From a solution of the search to a plan: ids, real GPUs, shares, routes, prices, the bottleneck in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hexgen2.scheduler.engines import RULES
from hexgen2.scheduler.evaluate import Evaluator, Option
from hexgen2.scheduler.layouts import layout_of
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.reasons import WORTH_TELLING, Alternative, rule_costs, runners_up, template_words
from hexgen2.scheduler.settle import IDLE, Settled, bottleneck, settle
from hexgen2.scheduler.shadow import Names, faster_links, marginal, more_gpus
from hexgen2.scheduler.solution import Solution
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Group, LinkLoad, Objective, Plan, Rejection, Role, Route, RunnerUp, Stage

ROLE_LETTER: dict[Role, str] = {"prefill": "p", "decode": "d", "colocated": "c"}
NEGLIGIBLE = 1e-9
"""Part of the whole flow below which a route or group counts as unused."""


@dataclass(frozen=True)
class Extras:
    """What a solver knows besides its solution.

    ``counted_singly``: its search gave every route the network to itself, so a note tells what that promised.
    """

    upper_bound: float | None = None
    notes: tuple[str, ...] = ()
    counted_singly: bool = False


def build(
    problem: Problem,
    cluster: Cluster,
    evaluator: Evaluator,
    solution: Solution,
    *,
    solver: str,
    seed: int,
    extras: Extras,
    shadow: bool = False,
) -> Plan:
    """The plan of a solution; the caller fills in ``wall_s``. ``shadow``: also what one GPU more is worth.

    ``cluster`` is the one to write into the plan (its nodes in the user's order). Groups that carry nothing are
    left out and named in the notes, as are GPUs in no group. Ids count by role, the busiest group first.
    """
    settled = settle(evaluator, solution)
    value = settled.value
    load = [_carried(settled, solution, cell) for cell in range(len(solution.cells))]
    used = [cell for cell, rps in enumerate(load) if rps > NEGLIGIBLE * value]
    order = sorted(used, key=lambda cell: (-load[cell], cell))
    ids: dict[int, str] = {}
    for role, letter in ROLE_LETTER.items():
        mine = [cell for cell in order if solution.cells[cell].role == role]
        ids.update({cell: f"{letter}{place}" for place, cell in enumerate(mine)})
    order = sorted(used, key=lambda cell: (list(ROLE_LETTER.values()).index(ids[cell][0]), int(ids[cell][1:])))

    shares = [load[cell] / value for cell in order]
    groups = _groups(problem, evaluator, solution, order, ids, shares)
    alternatives = runners_up(evaluator, solution, order)
    groups = tuple(
        group.model_copy(update={"runners_up": _runners_up(evaluator, value, found)})
        for group, found in zip(groups, alternatives, strict=True)
    )
    routes = _routes(settled, solution, ids)
    names = Names(*(_named(solution, ids, role) for role in ROLE_LETTER))
    return Plan(
        cluster=cluster,
        model=problem.model_name or problem.model.name,
        workload=problem.workload,
        engine=problem.engine.name,
        solver=solver,
        seed=seed,
        init=problem.init,
        profiles=problem.profiles,
        slo=problem.slo,
        objective=Objective(name=problem.objective, value=value, unit="requests/s"),
        throughput_rps=value,
        output_tokens_per_s=value * float(problem.lengths.outputs.mean()),
        price_per_hour=sum(group.price_per_hour for group in groups),
        upper_bound=extras.upper_bound,
        gap=None if extras.upper_bound is None else max(0.0, extras.upper_bound / value - 1),
        wall_s=0.0,
        groups=groups,
        routes=routes,
        links=_links(problem.cluster, settled),
        bottleneck=bottleneck(settled, problem.cluster, names.prefill, names.decode, names.colocated),
        shadow_prices=(
            *(more_gpus(problem, solution.cells, value, seed) if shadow else ()),
            *marginal(problem.cluster, solution, settled, names),
            *faster_links(problem.cluster, evaluator, solution, settled, names),
        ),
        rejected=(
            *rule_costs(evaluator, solution, value),
            *rejections(evaluator, solution, order, ids),
        ),
        notes=(
            *extras.notes,
            *_sharing_notes(settled, solution, extras),
            *_idle_notes(problem, groups),
            *_default_notes(problem),
        ),
    )


def _groups(
    problem: Problem,
    evaluator: Evaluator,
    solution: Solution,
    order: Sequence[int],
    ids: dict[int, str],
    shares: Sequence[float],
) -> tuple[Group, ...]:
    options = [_option(solution, cell) for cell in order]
    groups: list[Group] = []
    placements = evaluator.place([option.template for option in options])
    for cell, option, placement, share in zip(order, options, placements, shares, strict=True):
        gpus = problem.cluster.gpus
        price = sum(problem.cluster.gpu_price(gpus[gpu].node) for stage in placement for gpu in stage.gpus)
        groups.append(
            Group(
                id=ids[cell],
                role=solution.cells[cell].role,
                share=share,
                price_per_hour=price,
                capacity_rps=option.rps,
                max_batch=option.max_batch,
                token_budget=_token_budget(evaluator, option),
                stages=tuple(
                    Stage(
                        gpus=tuple(gpus[gpu].id for gpu in stage.gpus),
                        tp=len(stage.gpus),
                        first_layer=stage.first_layer,
                        layers=stage.layers,
                    )
                    for stage in placement
                ),
            )
        )
    return tuple(groups)


def _token_budget(evaluator: Evaluator, option: Option) -> int | None:
    """What a prefill group's memory allows of an iteration; None where that is the engine's setting."""
    cost = evaluator.problem.cost
    if option.role != "prefill":
        return None
    tokens = cost.max_kv_tokens(layout_of(evaluator.topology, option.template))
    budget = cost.settings.prefill_budget(tokens, len(option.template))
    return budget if budget < cost.settings.token_budget else None


def _runners_up(evaluator: Evaluator, value: float, found: Sequence[Alternative]) -> tuple[RunnerUp, ...]:
    return tuple(
        RunnerUp(
            role=one.role,
            layout=template_words(evaluator.topology, one.template),
            objective=one.value,
            loss=1 - one.value / value,
        )
        for one in found
    )


def _links(cluster: Cluster, settled: Settled) -> tuple[LinkLoad, ...]:
    """The links that KV caches cross, the busiest first."""
    found: list[LinkLoad] = []
    for resource, use in settled.busy.items():
        assert isinstance(resource, tuple)
        if resource[0] == "link":
            a, b = resource[1], resource[-1]
            load = {"from": cluster.nodes[a].name, "to": cluster.nodes[b].name, "use": use}
            load["bytes_per_s"] = use * cluster.node_link(a, b).bandwidth
            found.append(LinkLoad.model_validate(load))
    return tuple(sorted(found, key=lambda link: (-link.use, link.source, link.target)))


def rejections(
    evaluator: Evaluator, solution: Solution, order: Sequence[int], ids: dict[int, str]
) -> tuple[Rejection, ...]:
    """For each group whose best layout an engine rule forbids: the rule, the layout, its gain in rate."""
    found: list[Rejection] = []
    for cell in order:
        chosen, group = _option(solution, cell), solution.cells[cell]
        barred = [o for o in evaluator.options(group.members, group.role) if o.forbidden is not None]
        best = max(barred, key=lambda option: option.rps, default=None)
        if best is None or best.forbidden is None or best.rps <= chosen.rps * (1 + WORTH_TELLING):
            continue
        gain = best.rps / chosen.rps - 1
        layout = template_words(evaluator.topology, best.template)
        detail = f"{RULES[best.forbidden]}: without it {ids[cell]} as {layout} would serve {gain:.0%} more"
        found.append(Rejection(rule=best.forbidden, detail=detail, gain=gain, group=ids[cell]))
    return tuple(found)


def _routes(settled: Settled, solution: Solution, ids: dict[int, str]) -> tuple[Route, ...]:
    network = solution.flow.network
    found: list[Route] = []
    for row, column in zip(*np.nonzero(settled.routes > NEGLIGIBLE * settled.value), strict=True):
        source = ids.get(solution.cell_at("prefill", int(row)))
        target = ids.get(solution.cell_at("decode", int(column)))
        if source is None or target is None:
            continue
        rps = float(settled.routes[row, column])
        found.append(
            Route.model_validate(
                {
                    "from": source,
                    "to": target,
                    "share": rps / settled.value,
                    "rps": rps,
                    "capacity_rps": float(network.routes[row, column]),
                }
            )
        )
    return tuple(sorted(found, key=lambda route: (_number(route.source), _number(route.target))))


def _carried(settled: Settled, solution: Solution, cell: int) -> float:
    """Requests/s through a cell."""
    row = solution.place[cell]
    return 0.0 if row < 0 else settled.carried(solution.cells[cell].role, row)


def _named(solution: Solution, ids: dict[int, str], role: Role) -> list[str]:
    """Ids of a role's groups in the order of the network; idle ones (which no cut contains) have a dash."""
    rows = [
        (solution.place[cell], ids.get(cell, IDLE))
        for cell, found in enumerate(solution.cells)
        if found.role == role and solution.place[cell] >= 0
    ]
    return [name for _, name in sorted(rows)]


def _option(solution: Solution, cell: int) -> Option:
    option = solution.options[cell]
    assert option is not None, "a cell that carries requests has a layout"
    return option


def _sharing_notes(settled: Settled, solution: Solution, extras: Extras) -> tuple[str, ...]:
    """What the search's flow promised, where the shared network carries less."""
    flow = solution.flow.value
    if not extras.counted_singly or settled.value >= flow * (1 - WORTH_TELLING):
        return ()
    return (
        f"the search counted every route by itself and found {flow:.4g} requests/s; "
        f"links and NICs that routes share carry {settled.value:.4g}",
    )


def _idle_notes(problem: Problem, groups: Sequence[Group]) -> tuple[str, ...]:
    busy = {gpu for group in groups for gpu in group.gpus}
    idle = sorted(gpu.id for gpu in problem.cluster.gpus if gpu.id not in busy)
    if not idle:
        return ()
    return (f"no request would gain from {len(idle)} of the GPUs, they are left free: {', '.join(idle)}",)


def _default_notes(problem: Problem) -> tuple[str, ...]:
    """Which GPU types are planned with the efficiencies of their generation, since no profile names them."""
    efficiencies = problem.cost.efficiencies
    types = {gpu.type.name: gpu.type for gpu in problem.cluster.gpus}
    without = sorted(name for name, gpu in types.items() if efficiencies.is_default(gpu))
    if not without:
        return ()
    return (f"no profile has {', '.join(without)}: default efficiencies of the generation",)


def _number(name: str) -> int:
    return int(name[1:])
