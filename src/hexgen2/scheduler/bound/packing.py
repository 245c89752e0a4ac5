"""Superadditive closure: the most that groups made of given GPUs are worth together.

Cells of a grid stand for GPU counts per place; ``values[c]`` is what one group of these counts is worth. The
closure F[g] is the largest sum of values over groups that fit into g together, some GPUs idle or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Exact = Callable[[IntArray, FloatArray], FloatArray]
"""Values of cells (M, K) as far as they are above what is given for each (M,); else anything not above that."""
NEGLIGIBLE = 1e-3
"""A group that is worth at most this part more than its GPUs in smaller groups is no group of its own."""


@dataclass(frozen=True)
class Groups:
    """Groups that are worth more than their parts: ``cells`` (M, K) and ``values`` (M,)."""

    cells: IntArray
    values: FloatArray


def closure(guesses: FloatArray, exact: Exact) -> tuple[FloatArray, Groups]:
    """(F, the groups of which it is made). ``guesses``: never below the values, shaped as the grid.

    For every packing of groups into g the sum of their values is at most (1 + NEGLIGIBLE)·F[g].
    """
    shape = guesses.shape
    best = np.zeros(shape)
    cells = np.argwhere(guesses > 0)
    sizes = cells.sum(axis=1)
    kept: list[IntArray] = []
    worth: list[float] = []
    for size in range(1, int(sizes.max(initial=0)) + 1):
        mine = cells[sizes == size]
        least = best[tuple(mine.T)] * (1 + NEGLIGIBLE)
        open_cells = guesses[tuple(mine.T)] > least
        mine, least = mine[open_cells], least[open_cells]
        if not len(mine):
            continue
        values = exact(mine, least)
        for row in np.nonzero(values > least)[0]:
            kept.append(mine[row])
            worth.append(float(values[row]))
            _add(best, tuple(int(count) for count in mine[row]), worth[-1])
    return best, Groups(np.array(kept, dtype=np.int64).reshape(-1, len(shape)), np.array(worth))


def joined(start: FloatArray, groups: Groups, weight: float) -> FloatArray:
    """The closure ``start`` with more groups, at a part of their values."""
    best = start.copy()
    for cell, value in zip(groups.cells, groups.values * weight, strict=True):
        at = tuple(int(count) for count in cell)
        if value > best[at]:
            _add(best, at, float(value))
    return best


def parts(best: FloatArray, groups: Groups, cell: IntArray) -> list[IntArray]:
    """Groups that together are worth what the closure says of a cell (rounding apart)."""
    found: list[IntArray] = []
    left = cell.copy()
    order = np.argsort(-groups.values, kind="stable")
    while best[tuple(left)] > 0:
        fitting = order[np.all(groups.cells[order] <= left, axis=1)]
        worth = groups.values[fitting] + best[tuple((left - groups.cells[fitting]).T)]
        chosen = groups.cells[fitting[int(np.argmax(worth >= worth.max(initial=0.0) * (1 - 1e-9)))]]
        found.append(chosen)
        left = left - chosen
    return found


def _add(best: FloatArray, cell: tuple[int, ...], value: float) -> None:
    """Allow any number of groups of a cell."""
    shape = best.shape
    without = tuple(slice(0, length - count) for length, count in zip(shape, cell, strict=True))
    with_one = tuple(slice(count, length) for length, count in zip(shape, cell, strict=True))
    for _ in range(min((length - 1) // count for length, count in zip(shape, cell, strict=True) if count)):
        raised = best[without] + value
        target = best[with_one]
        if not np.any(raised > target):
            return
        np.maximum(target, raised, out=target)


def efficient(best: FloatArray) -> IntArray:
    """(M, K) cells with a positive value of which no GPU can be left out without loss."""
    keep = best > 0
    for axis in range(best.ndim):
        shifted = np.zeros_like(best)
        inner = [slice(None)] * best.ndim
        outer = [slice(None)] * best.ndim
        inner[axis], outer[axis] = slice(0, -1), slice(1, None)
        shifted[tuple(outer)] = best[tuple(inner)]
        has_one = np.arange(best.shape[axis]).reshape([-1 if a == axis else 1 for a in range(best.ndim)]) > 0
        keep &= ~(has_one & (best <= shifted * (1 + 1e-12)))
    return np.argwhere(keep).astype(np.int64)
