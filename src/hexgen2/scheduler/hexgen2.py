"""The default solver: the paper's loop over a wider space, from better starts, with exact shared routes.

Against `paper`: any layout that raises the rate may be taken (layers moved singly, every order of few nodes),
colocated groups compete in the same network, starts come from the master program over group templates, and
links and NICs that several routes share are counted in the objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from hexgen2.scheduler import moves
from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.scheduler.feasible import no_plan
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.problem import Budget, Problem
from hexgen2.scheduler.refine import climb
from hexgen2.scheduler.solution import Cell, Solution, assess, better
from hexgen2.scheduler.starts import colocated_starts, master_starts, paper_starts

SMALL = 10
"""GPUs up to which every start is climbed to its end with thorough layouts, the paper's starts too."""
MEDIUM = 32
"""GPUs up to which every start is climbed for some states, the first of the paper's too."""
PAPER_STARTS = 3
START_STATES = 250
WORK = 30_000
"""States valued times groups, about: what the climb of a larger cluster may take when no time is given."""
LEAST_STATES = 12
ROUND_STATES = 200
FINISH = 0.1
SHAKEN = 3
"""Random moves that begin another round of an anytime search."""


def evaluator_for(problem: Problem) -> Evaluator:
    """The evaluator to search with: thorough about layouts where GPUs are few."""
    return Evaluator(problem, best_rate, thorough=len(problem.cluster.gpus) <= SMALL)


def search(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """The best plan found; InputError when no replica fits."""
    start = _all_starts if evaluator.thorough else _best_start
    best = start(problem, evaluator, seed, budget)
    if best.value <= 0:
        raise no_plan(evaluator)
    return best


def finished(
    evaluator: Evaluator, best: Solution, starts: Sequence[Cells], budget: Budget
) -> tuple[Solution, Evaluator]:
    """The best of a plan and of further starts, those that the upper bound is made of, with thorough layouts.

    They come after the search, so that an anytime search has a plan at once; they may take `FINISH` of its time
    limit more. Also gives the evaluator that knows the layouts.
    """
    if budget.limit_s is not None:
        budget.limit_s = budget.spent_s + FINISH * budget.limit_s
    for cells in starts:
        budget.states = START_STATES
        found = climb(evaluator, _valued(evaluator, cells), moves_from, budget, set(), coupled=True)
        best = _report(best, found, budget)
    if evaluator.thorough:
        return best, evaluator
    thorough = Evaluator(evaluator.problem, best_rate, thorough=True)
    for cells in (best.cells, *starts):
        polished = _valued(thorough, cells)
        if better(polished, best):
            best, evaluator = polished, thorough
            budget.report("layouts", best.value)
    return best, evaluator


def moves_from(solution: Solution) -> Iterator[Cells]:
    """What the residual network suggests, with colocated groups as a third role."""
    yield from moves.wider(solution)
    yield from moves.guided(solution, colocated=True)


def _all_starts(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """Climb from every start to its end."""
    best = _nothing(evaluator)
    seen: set[frozenset[Cell]] = set()
    partitions = list(paper_starts(problem, evaluator, seed))
    for cells in (
        *master_starts(problem, evaluator),
        *partitions,
        *colocated_starts(evaluator, partitions),
    ):
        found = climb(evaluator, _valued(evaluator, cells), moves_from, budget, seen, coupled=True)
        best = _report(best, found, budget)
        if budget.over and best.value > 0:
            break
    return best


def _best_start(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """Climb from the best start; with a time limit shake the best plan and climb again until time is over."""
    best = _nothing(evaluator)
    medium = len(problem.cluster.gpus) <= MEDIUM
    for cells in master_starts(problem, evaluator):
        found = _valued(evaluator, cells)
        if medium:
            budget.states = START_STATES
            found = climb(evaluator, found, moves_from, budget, set(), coupled=True)
        best = _report(best, found, budget)
    if best.value <= 0 or medium:
        for cells in islice(paper_starts(problem, evaluator, seed), PAPER_STARTS):
            budget.states = START_STATES
            found = climb(evaluator, _valued(evaluator, cells), moves_from, budget, set(), coupled=True)
            best = _report(best, found, budget)
    if best.value <= 0:
        for cells in paper_starts(problem, evaluator, seed):
            best = _report(best, _valued(evaluator, cells), budget)
    seen: set[frozenset[Cell]] = set()
    budget.states = max(LEAST_STATES, WORK // max(1, len(best.cells)) ** 2)
    best = _report(best, climb(evaluator, best, moves_from, budget, seen, coupled=True), budget)
    rng = np.random.default_rng(seed)
    while best.cells and budget.limit_s is not None and not budget.timed_out:
        budget.states = ROUND_STATES
        start = _valued(evaluator, moves.shaken(best, rng, SHAKEN))
        best = _report(best, climb(evaluator, start, moves_from, budget, set(), coupled=True), budget)
    return best


def _report(best: Solution, found: Solution, budget: Budget) -> Solution:
    if not better(found, best):
        return best
    budget.report("start", found.value)
    return found


def _nothing(evaluator: Evaluator) -> Solution:
    return _valued(evaluator, ())


def _valued(evaluator: Evaluator, cells: Cells) -> Solution:
    solution = assess(evaluator, cells, coupled=True)
    assert solution is not None, "no lower limit was given"
    return solution
