"""DistServe: homogeneous disaggregation, by trying every parallelism of both phases.

Every prefill replica has one (TP, PP), every decode replica another; replicas are cut from the GPUs of one kind
of node at a time (the system knows one kind of GPU), filling nodes in turn. All pairs of parallelisms and all
numbers of replicas of both phases are tried on each kind; kinds serve side by side as separate deployments.

`distserve_pairs` is the system as its released launcher starts it: an instance is one prefill and one decode
replica, and a deployment is as many such pairs as the GPUs hold (LLMServe/DistServe,
evaluation/2-benchmark-serving/2-start-api-server.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from hexgen2.scheduler.columns import Kinds
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.feasible import no_disaggregation
from hexgen2.scheduler.flow import solve
from hexgen2.scheduler.layouts import StageTemplate, Template
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.problem import Budget, Problem
from hexgen2.scheduler.solution import Cell, Solution, assemble, better
from hexgen2.scheduler.topology import Members, members_of
from hexgen2.specs.plan import Role

MOST_PP = 8


def distserve(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """The best deployment of each kind of node, all together; routes join only groups of one kind."""
    del problem, seed
    return _search(evaluator, budget, lambda _: True)


def distserve_pairs(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """The same among deployments with as many prefill as decode replicas."""
    del problem, seed
    return _search(evaluator, budget, paired)


def paired(cells: Cells) -> bool:
    """Whether there are as many prefill as decode replicas."""
    return 2 * sum(cell.role == "prefill" for cell in cells) == len(cells)


def _search(evaluator: Evaluator, budget: Budget, allowed: Callable[[Cells], bool]) -> Solution:
    kinds = Kinds(evaluator.topology)
    chosen: list[Cell] = []
    for kind in range(len(kinds.nodes)):
        best: Solution | None = None
        for cells in filter(allowed, deployments(evaluator, kinds, kind)):
            found = assemble(
                evaluator, cells, [evaluator.layout(cell.members, cell.role, cell.template) for cell in cells]
            )
            if found.value > 0 and (best is None or better(found, best)):
                best = found
        if best is not None:
            chosen += best.cells
            budget.report("kind", best.value)
    options = [evaluator.layout(cell.members, cell.role, cell.template) for cell in chosen]
    solution = _apart(kinds, assemble(evaluator, chosen, options))
    if solution.value <= 0:
        raise no_disaggregation(evaluator)
    return solution


def _apart(kinds: Kinds, solution: Solution) -> Solution:
    """The solution without routes between kinds."""
    rows: dict[str, list[int]] = {"prefill": [], "decode": []}
    for cell, row in zip(solution.cells, solution.place, strict=True):
        if row >= 0:
            rows[cell.role].append(kinds.of_node[cell.members[0][0]])
    same = np.array(rows["prefill"])[:, None] == np.array(rows["decode"])[None, :]
    network = replace(solution.flow.network, routes=np.where(same, solution.flow.network.routes, 0.0))
    return replace(solution, flow=solve(network))


def deployments(evaluator: Evaluator, kinds: Kinds, kind: int) -> Iterator[Cells]:
    """Every (TP, PP) for prefill and for decode with every split of the kind's GPUs between them."""
    total = len(kinds.nodes[kind]) * kinds.count(kind)
    shapes = [(tp, pp) for tp in evaluator.sizes for pp in range(1, MOST_PP + 1) if tp * pp <= total]
    rated: dict[Role, list[tuple[int, int]]] = {
        role: [shape for shape in shapes if _replica(evaluator, kinds, kind, shape, role)]
        for role in ("prefill", "decode")
    }
    for prefill in rated["prefill"]:
        for decode in rated["decode"]:
            for count in range(1, total // (prefill[0] * prefill[1]) + 1):
                most = (total - count * prefill[0] * prefill[1]) // (decode[0] * decode[1])
                # As many decode replicas as there is room for, and as many as there are of the other phase.
                for decodes in dict.fromkeys((most, min(most, count))):
                    wanted: list[tuple[Role, tuple[int, int]]] = [("prefill", prefill)] * count
                    wanted += [("decode", decode)] * decodes
                    cells = _dealt(evaluator, kinds, kind, wanted) if decodes else ()
                    if cells:
                        yield cells


def _replica(evaluator: Evaluator, kinds: Kinds, kind: int, shape: tuple[int, int], role: Role) -> bool:
    return bool(_dealt(evaluator, kinds, kind, [(role, shape)]))


def _dealt(evaluator: Evaluator, kinds: Kinds, kind: int, wanted: list[tuple[Role, tuple[int, int]]]) -> Cells:
    """Replicas on the kind's nodes, TP groups inside nodes; () when they do not pack or hold no replica."""
    free = {node: kinds.count(kind) for node in kinds.nodes[kind]}
    cells: list[Cell] = []
    for role, (tp, pp) in wanted:
        stages: list[Members] = []
        for _ in range(pp):
            node = next((node for node, gpus in free.items() if gpus >= tp), None)
            if node is None:
                return ()
            free[node] -= tp
            stages.append(((node, tp),))
        counts: dict[int, int] = {}
        for ((node, gpus),) in stages:
            counts[node] = counts.get(node, 0) + gpus
        template = _even(evaluator, stages)
        members = members_of(counts)
        if template is None or evaluator.layout(members, role, template) is None:
            return ()
        cells.append(Cell(members, role, template))
    return tuple(cells)


def _even(evaluator: Evaluator, stages: list[Members]) -> Template | None:
    """Layers spread evenly, as uniform pipelines are."""
    layers = evaluator.problem.model.layers
    if len(stages) > layers:
        return None
    base, more = divmod(layers, len(stages))
    return tuple(StageTemplate(part, base + (place < more)) for place, part in enumerate(stages))
