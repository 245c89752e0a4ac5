"""From a saved plan back to the search's view of it, to explain it or to search on from it."""

from __future__ import annotations

from dataclasses import replace

from hexgen2.cost.queues import prompt_queue
from hexgen2.scheduler.evaluate import Evaluator, Option, best_rate, paper_rule
from hexgen2.scheduler.layouts import StageTemplate, Template, layout_of
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.solution import Cell, Solution, assemble
from hexgen2.scheduler.topology import canonical, members_of
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Group, Plan


def restored(problem: Problem, plan: Plan) -> tuple[Problem, Evaluator, Solution]:
    """The plan's groups with their layouts and figures, over the cluster in the search's own order.

    ``problem`` is the one that the plan answers. A group's rate is the plan's, not worked out again.
    """
    sorted_problem = replace(problem, cluster=canonical(plan.cluster))
    rule = paper_rule if plan.solver in ("paper", "genetic", "random-swap") else best_rate
    evaluator = Evaluator(sorted_problem, rule, thorough=plan.solver == "hexgen2")
    cells: list[Cell] = []
    options: list[Option] = []
    for group in plan.groups:
        template = _template(sorted_problem.cluster, group)
        counts: dict[int, int] = {}
        for stage in template:
            for node, gpus in stage.members:
                counts[node] = counts.get(node, 0) + gpus
        cells.append(Cell(members_of(counts), group.role, template))
        options.append(_option(sorted_problem, evaluator, group, template))
    return sorted_problem, evaluator, assemble(evaluator, cells, options)


def _option(problem: Problem, evaluator: Evaluator, group: Group, template: Template) -> Option:
    """A group at the plan's rate; under goodput with what its routes need to know of it."""
    option = Option(group.role, template, group.capacity_rps, group.max_batch, 0.0)
    targets = problem.targets
    if targets is None or group.role == "colocated":
        return option
    cost, moments = problem.cost, problem.cost.moments(problem.lengths)
    layout = layout_of(evaluator.topology, template)
    if group.role == "decode":
        return replace(option, latency_s=cost.decode_capacity(layout, moments, targets.tpot_s).tpot_s)
    batch = max(1, cost.prefill_capacity(layout, moments).batch_requests)
    queue = prompt_queue(cost.compiled(layout).costs, moments, batch, cost.settings)
    return replace(option, queue=queue)


def _template(cluster: Cluster, group: Group) -> tuple[StageTemplate, ...]:
    stages: list[StageTemplate] = []
    for stage in group.stages:
        counts: dict[int, int] = {}
        for gpu in stage.gpus:
            node = cluster.gpu_by_id[gpu].node
            counts[node] = counts.get(node, 0) + 1
        stages.append(StageTemplate(tuple(sorted(counts.items())), stage.layers))
    return tuple(stages)
