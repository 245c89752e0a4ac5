"""The default solver: the paper's loop over a wider space, from better starts, with exact shared routes.

Against `paper`: any layout that raises the rate may be taken (layers moved singly, every order of few nodes),
colocated groups compete in the same network, starts come from the master program over group templates, and
links and NICs that several routes share are counted in the objective.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hexgen2.scheduler import moves, paper
from hexgen2.scheduler.columns import Column, Kinds, columns
from hexgen2.scheduler.evaluate import ROLES, Evaluator
from hexgen2.scheduler.feasible import no_plan
from hexgen2.scheduler.master import best_counts, program
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.problem import Budget, Problem
from hexgen2.scheduler.refine import climb
from hexgen2.scheduler.solution import Cell, Solution, assess, better
from hexgen2.specs.plan import Role

PAPER_STARTS = 24
"""GPUs up to which the paper's first partitions are starts too."""


def search(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """The best plan over all starts; raises InputError when no replica fits."""
    best: Solution | None = None
    seen: set[frozenset[Cell]] = set()
    for cells in starts(problem, evaluator, seed):
        begin = assess(evaluator, cells, coupled=True)
        assert begin is not None, "no lower limit was given"
        found = climb(evaluator, begin, moves_from, budget, seen, coupled=True)
        if best is None or better(found, best):
            best = found
            budget.report("start", best.value)
        if budget.over and best.value > 0:
            break
    if best is None or best.value <= 0:
        raise no_plan(evaluator)
    return best


def moves_from(solution: Solution) -> Iterator[Cells]:
    """Guided moves with colocated groups, and GPUs let go."""
    yield from moves.guided(solution, colocated=True)


def starts(problem: Problem, evaluator: Evaluator, seed: int) -> Iterator[Cells]:
    """First plans: the master program's over all roles, over colocated and over disaggregated groups alone."""
    kinds = Kinds(evaluator.topology)
    found = columns(evaluator, kinds)
    tokens = float(problem.lengths.inputs.mean())
    kv_bytes = tokens * problem.model.kv_bytes_per_token
    choices: tuple[tuple[Role, ...], ...] = (ROLES, ("colocated",), ("prefill", "decode"))
    for roles in choices:
        mine = [column for column in found if column.role in roles]
        if mine:
            counts = best_counts(program(kinds, mine, kv_bytes))
            cells = placed(kinds, mine, [int(count) for count in counts])
            if cells:
                yield cells
    if len(problem.cluster.gpus) <= PAPER_STARTS and len(problem.cluster.gpus) > 1:
        for start in paper.starts(problem, evaluator, np.random.default_rng(seed)):
            yield start.cells


def placed(kinds: Kinds, found: list[Column], counts: list[int]) -> Cells:
    """The master's groups on real nodes: the widest first, each on the best linked nodes with room."""
    free = np.array(kinds.topology.counts)
    order = sorted(
        (v for v, count in enumerate(counts) if count),
        key=lambda v: (-len(found[v].parts), -sum(gpus for _, gpus in found[v].parts), v),
    )
    cells: list[Cell] = []
    for v in order:
        for _ in range(counts[v]):
            members = kinds.best_nodes(found[v].parts, free)
            if members is None:
                break
            for node, gpus in members:
                free[node] -= gpus
            cells.append(Cell(members, found[v].role))
    return tuple(cells)
