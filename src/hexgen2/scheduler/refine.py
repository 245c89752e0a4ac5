"""The refinement loop: try moves, keep what raises the flow, undo the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.problem import Budget
from hexgen2.scheduler.solution import Cell, Solution, assess, better

MoveSource = Callable[[Solution], Iterable[Cells]]


def climb(
    evaluator: Evaluator,
    start: Solution,
    moves: MoveSource,
    budget: Budget,
    seen: set[frozenset[Cell]],
    *,
    coupled: bool = False,
) -> Solution:
    """From ``start``, take the first move that improves and begin again, until none does or time is over.

    ``seen`` remembers cells' sets that were valued already (also by earlier climbs), so that no state is
    valued twice. Never returns anything worse than ``start``.
    """
    current = start
    improved = True
    while improved and not budget.over:
        improved = False
        for cells in moves(current):
            key = frozenset(cells)
            if len(key) == len(cells) and key in seen:
                continue
            seen.add(key)
            budget.count_state()
            candidate = assess(evaluator, cells, current.value, coupled=coupled)
            if candidate is not None and better(candidate, current):
                current = candidate
                improved = True
                budget.report("refine", current.value)
                break
            if budget.over:
                break
    return current
