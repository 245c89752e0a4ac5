"""The bound for small clusters: every way to give nodes' GPUs to whole groups (docs/bound.md).

Groups are GPU counts per node. The closures of the groups' rates (`packing`) tell the most that GPUs g prefill,
decode or serve colocated; then every split of the cluster's GPUs into the three is looked at, best first, with
the flow that the network can carry between its prefill and decode GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.bound.exchange import Exchange
from hexgen2.scheduler.bound.groups import GroupTable
from hexgen2.scheduler.bound.packing import NEGLIGIBLE, Groups, closure, efficient, joined, parts
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.result import Bound
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.solution import Cell
from hexgen2.scheduler.topology import Topology, members_of
from hexgen2.specs.plan import ROLES, Role

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
FIRST_BATCH = 200
STARTS = 3
"""Splits that are handed to the search."""
PARTS = 11
"""Weights of prefill against decode among which the best is taken to leave out splits early."""


def grid_bound(problem: Problem, topology: Topology, exchange: Exchange | None = None) -> Bound:
    """Requests/s that no plan exceeds, and plans that might come near. ``exchange``: not the network's."""
    places = Places.of_nodes(topology)
    exchange = exchange or Exchange(problem, places)
    closed = {role: _Closed.of(problem, places, role) for role in ROLES}
    splits = _Splits(closed["colocated"], closed["prefill"], closed["decode"], exchange)
    value, best = splits.best()
    return Bound(value * (1 + NEGLIGIBLE), tuple(splits.cells(giving, taking) for giving, taking in best))


@dataclass(frozen=True)
class _Closed:
    """What GPUs are worth at most in a role, and the groups of which that is made."""

    role: Role
    best: FloatArray
    groups: Groups

    @staticmethod
    def of(problem: Problem, places: Places, role: Role) -> _Closed:
        table = GroupTable(problem, places, role)
        return _Closed(role, *closure(table.guesses, table.exact))

    def cells(self, counts: IntArray) -> list[Cell]:
        """Groups of at most these GPUs per node."""
        return [
            Cell(members_of(dict(enumerate(map(int, part)))), self.role)
            for part in parts(self.best, self.groups, counts)
        ]


@dataclass(frozen=True)
class _Batch:
    """Splits (M,): GPUs that prefill and decode (M, K), what these serve but for the network, and the rest."""

    giving: IntArray
    taking: IntArray
    through: FloatArray
    rest: FloatArray

    @property
    def hope(self) -> FloatArray:
        return self.through + self.rest


@dataclass(frozen=True)
class _Splits:
    """Splits of all GPUs into prefill, decode and colocated ones."""

    colocated: _Closed
    prefill: _Closed
    decode: _Closed
    exchange: Exchange

    def best(self) -> tuple[float, list[tuple[IntArray, IntArray]]]:
        """The most that any split serves, and the GPUs that prefill and decode in the best ones of them."""
        everything = np.array(self.colocated.best.shape) - 1
        best = float(self.colocated.best[tuple(everything)])
        found = [(best, np.zeros_like(everything), np.zeros_like(everything))]
        weight = self._weight(best)
        if weight is not None:
            giving, hopes = self._promising(self.prefill, weight, self.decode, best)
            taking, _ = self._promising(self.decode, 1 - weight, self.prefill, best)
            for splits in self._ordered(giving, hopes, taking, best):
                if splits.hope[0] <= best:
                    break
                values = (
                    np.minimum(splits.through, self.exchange.most(splits.giving, splits.taking)) + splits.rest
                )
                best = max(best, float(values.max()))
                for row in np.argsort(-values)[:STARTS]:
                    found.append((float(values[row]), splits.giving[row], splits.taking[row]))
        found.sort(key=lambda split: -split[0])
        return best, [(giving, taking) for _, giving, taking in found[:STARTS]]

    def cells(self, giving: IntArray, taking: IntArray) -> tuple[Cell, ...]:
        """The groups of a split."""
        rest = np.array(self.colocated.best.shape) - 1 - giving - taking
        return (*self.prefill.cells(giving), *self.decode.cells(taking), *self.colocated.cells(rest))

    def _ordered(self, giving: IntArray, hopes: FloatArray, taking: IntArray, best: float) -> Iterator[_Batch]:
        """Splits that serve more than ``best`` but for the network, the most hopeful ones first."""
        shape = self.colocated.best.shape
        everything = np.array(shape) - 1
        strides = np.array([prod(shape[axis + 1 :]) for axis in range(len(shape))], dtype=np.int64)
        flat, last = self.colocated.best.ravel(), int(everything @ strides)
        taken, takes = taking @ strides, self.decode.best[tuple(taking.T)]
        gives = self.prefill.best[tuple(giving.T)]
        found: list[tuple[IntArray, IntArray, FloatArray, FloatArray]] = []
        for row in np.argsort(-hopes, kind="stable"):
            fits = np.nonzero(np.all(taking <= everything - giving[row], axis=1))[0]
            rest = flat[last - int(giving[row] @ strides) - taken[fits]]
            through = np.minimum(gives[row], takes[fits])
            over = through + rest > best
            found.append((np.full(int(over.sum()), row), fits[over], through[over], rest[over]))
        if not found:
            return
        rows, columns, through, rest = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(-(through + rest), kind="stable")
        start, size = 0, FIRST_BATCH
        while start < len(order):
            part = order[start : start + size]
            yield _Batch(giving[rows[part]], taking[columns[part]], through[part], rest[part])
            start, size = start + size, 2 * size

    def _weight(self, best: float) -> float | None:
        """The λ for which λ·P + (1 − λ)·D ≥ min(P, D) is least; None where it shows that nothing is better."""
        found = []
        for weight in np.linspace(0, 1, PARTS):
            prefilling = joined(self.colocated.best, self.prefill.groups, float(weight))
            value = float(joined(prefilling, self.decode.groups, 1 - float(weight)).max())
            if value <= best:
                return None
            found.append((value, float(weight)))
        return min(found)[1]

    def _promising(
        self, phase: _Closed, weight: float, other: _Closed, best: float
    ) -> tuple[IntArray, FloatArray]:
        """(M, K) GPUs of one phase that could be part of something better, and (M,) what that is at most."""
        cells = efficient(phase.best)
        rest = joined(self.colocated.best, other.groups, 1 - weight)
        hopes = weight * phase.best[tuple(cells.T)] + rest[tuple((np.array(rest.shape) - 1 - cells).T)]
        keep = hopes > best
        return cells[keep], hopes[keep]
