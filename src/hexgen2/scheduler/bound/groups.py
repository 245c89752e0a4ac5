"""The rate of the best group of given GPUs in a role: every cut into stages that the engine allows."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.rates import GroupRates
from hexgen2.scheduler.bound.stages import Slot, Stages
from hexgen2.scheduler.layouts import count_partitions, valid_tps
from hexgen2.scheduler.problem import Problem
from hexgen2.specs.gpu import Link, weakest
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
LOOKED_AT = (1, 3, 12, 1_000_000)
"""Cuts of a group valued closely at a time, those with the best quick rates first."""


def tp_sizes(problem: Problem, places: Places) -> list[int]:
    """TP sizes that any group may have, in one node or over several."""
    gpus = sum(places.room)
    return [tp for tp in valid_tps(problem.model, gpus) if tp <= gpus]


def pipelined(problem: Problem, role: Role) -> bool:
    """Whether the engine allows groups of several stages in a role."""
    engine = problem.engine
    return role == "colocated" or (engine.decode_pp if role == "decode" else engine.prefill_pp)


def count_cuts(problem: Problem, places: Places) -> int:
    """How many rows of stage counts the groups of a cluster have."""
    slots = [_slots(places, [tp]) for tp in tp_sizes(problem, places)]
    if problem.engine.uniform_tp:
        return sum(prod(places.room[place] // tp + 1 for place, tp in row) for row in slots)
    found = 1
    for place in range(len(places)):
        sizes = [tp for tp in tp_sizes(problem, places) if tp <= places.width[place]]
        found *= sum(count_partitions(gpus, tuple(sizes)) for gpus in range(places.room[place] + 1))
    return found


class GroupTable:
    """Rates by GPUs per place: ``guesses`` for all, `exact` on demand."""

    def __init__(self, problem: Problem, places: Places, role: Role) -> None:
        self.rates = GroupRates(problem, places, role)
        self.shape = tuple(count + 1 for count in places.room)
        sizes = tp_sizes(problem, places)
        self.single = np.zeros(self.shape)
        for tp in sizes:
            self._one_stage(tp)
        self.guesses = self.single.copy()
        self._found: list[_Found] = []
        if pipelined(problem, role):
            for stages in _all_stages(places, sizes, uniform=problem.engine.uniform_tp):
                found = _Found.of(self.rates, stages, self.shape)
                np.maximum.at(self.guesses.ravel(), found.cells, found.quick)
                self._found.append(found)

    def exact(self, cells: IntArray, least: FloatArray) -> FloatArray:
        """(M,) the rates of groups of the cells (M, K), as far as they are above ``least`` (M,)."""
        best: FloatArray = self.single[tuple(cells.T)].copy()
        flat = np.ravel_multi_index(tuple(cells.T), self.shape)
        for found in self._found:
            begin = np.searchsorted(found.cells, flat, side="left")
            end = np.searchsorted(found.cells, flat, side="right")
            for step in LOOKED_AT:
                step = min(step, int((end - begin).max(initial=0)))
                places = begin[:, None] + np.arange(step)[None, :]
                groups, _ = np.nonzero(places < end[:, None])
                rows = places[places < end[:, None]]
                good = found.quick[rows] > np.maximum(best, least)[groups]
                groups, rows = groups[good], rows[good]
                if not len(rows):
                    break
                close = self.rates.close(found.stages.rows(rows), found.batches[rows], least[groups])
                np.maximum.at(best, groups, close)
                begin = begin + step
        return best

    def _one_stage(self, tp: int) -> None:
        """The rates of groups that are one stage of ``tp`` GPUs, in one node or over several."""
        places, rates = self.rates.places, self.rates
        if tp == 1:
            for place in range(len(places)):
                cell = tuple(int(at == place) for at in range(len(places)))
                self.single[cell] = rates.one_stage(places.types[place], 1, None)
            return
        cells = np.argwhere(np.indices(self.shape).sum(axis=0) == tp)
        if rates.problem.engine.even_stages:
            cells = cells[cells.max(axis=1) * (cells > 0).sum(axis=1) == tp]
        masks, which = np.unique(np.concatenate([cells > 0, cells > 1], axis=1), axis=0, return_inverse=True)
        known: dict[tuple[frozenset[str], Link], float] = {}
        values = np.zeros(len(masks))
        for row, mask in enumerate(masks):
            here, several = np.nonzero(mask[: len(places)])[0], mask[len(places) :]
            link = _slowest(places, here, several[here])
            key = (frozenset(places.types[place].name for place in here), link)
            if key not in known:
                known[key] = rates.one_stage(weakest([places.types[place] for place in here]), tp, link)
            values[row] = known[key]
        at = tuple(cells.T)
        self.single[at] = np.maximum(self.single[at], values[which.ravel()])


def _slowest(places: Places, here: IntArray, several: NDArray[np.bool_]) -> Link:
    """The slowest link among GPUs of single nodes; ``several``: nodes with more than one of the GPUs."""
    nodes = [places.nodes[place][0] for place in here]
    pairs = np.ix_(nodes, nodes)
    joined = ~np.eye(len(nodes), dtype=bool) | np.diag(several)
    topology = places.topology
    return Link(
        bandwidth=float(topology.bandwidth[pairs][joined].min()),
        latency=float(topology.latency[pairs][joined].max()),
    )


class _Found:
    """Quick rates of rows of stages, sorted by their cells and then from the fastest down."""

    def __init__(self, stages: Stages, cells: IntArray, quick: FloatArray, batches: IntArray) -> None:
        self.stages, self.cells, self.quick, self.batches = stages, cells, quick, batches

    @staticmethod
    def of(rates: GroupRates, stages: Stages, shape: tuple[int, ...]) -> _Found:
        quick, batches = rates.quick(stages)
        keep = np.nonzero(quick > 0)[0]
        cells = np.ravel_multi_index(tuple(stages.gpus[keep].T), shape)
        order = np.lexsort((-quick[keep], cells))
        keep = keep[order]
        return _Found(stages.rows(keep), cells[order].astype(np.int64), quick[keep], batches[keep])


def _all_stages(places: Places, sizes: list[int], *, uniform: bool) -> list[Stages]:
    """Every row of stage counts: of one TP size each, or of any."""
    if uniform:
        found = []
        for tp in sizes:
            slots = _slots(places, [tp])
            most = [places.room[place] // tp for place, _ in slots]
            if sum(most) >= 2:
                counts = np.indices([count + 1 for count in most]).reshape(len(most), -1).T
                found.append(Stages(places, slots, counts.astype(np.int64)))
        return found
    slots = _slots(places, sizes)
    choices = []
    for place in range(len(places)):
        mine = tuple(tp for at, tp in slots if at == place)
        choices.append(_cuts(places.room[place], mine))
    rows = [sum(parts, ()) for parts in product(*choices)]
    return [Stages(places, slots, np.array(rows, dtype=np.int64))]


def _slots(places: Places, sizes: list[int]) -> tuple[Slot, ...]:
    return tuple((place, tp) for place in range(len(places)) for tp in sizes if tp <= places.width[place])


def _cuts(room: int, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Numbers of stages of each size that fit into so many GPUs."""
    found = product(*(range(room // tp + 1) for tp in sizes))
    return [cut for cut in found if sum(n * tp for n, tp in zip(cut, sizes, strict=True)) <= room]
