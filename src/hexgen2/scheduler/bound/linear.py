"""The bound for large clusters: a linear program over groups, not necessarily whole ones (docs/bound.md).

Groups are counts of stages by kind of node. Of those up to some length every one is a column of the program;
the columns that matter are found by their reduced costs, and only these are valued closely. Longer pipelines
count stage by stage. Links and NICs limit what kinds of node exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import comb

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.bound.columns import Columns
from hexgen2.scheduler.bound.exchange import Exchange
from hexgen2.scheduler.bound.groups import pipelined, tp_sizes
from hexgen2.scheduler.bound.long import LongPipelines
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.program import Prices, Program
from hexgen2.scheduler.bound.rates import GroupRates
from hexgen2.scheduler.bound.stages import Slot, Stages
from hexgen2.scheduler.problem import Problem
from hexgen2.specs.plan import ROLES, Role

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
ROWS = 21_000
"""Groups of one TP size that are columns, at most: this sets how long these pipelines are."""
LONGEST = 24
ROUNDS = 60
CLOSE = 200
"""Groups of a role and a TP size that are valued closely in a round, at most."""
ADDED = 40
"""Columns that are added of these."""
MOST_OVER = 5e-4
"""By how much prices may be too low in the end."""
TOLERANCE = 2e-4
"""What a group is worth beyond its price, as a part of that, that counts as nothing."""


def linear_bound(problem: Problem, places: Places, exchange: Exchange | None = None) -> float | None:
    """Requests/s that no plan exceeds; None where `ROUNDS` are too few. ``exchange`` as in `grid_bound`."""
    longest = longest_column(len(places))
    pools = [_Pool(problem, places, role, longest) for role in ROLES]
    exchange = exchange or Exchange(problem, places)
    program = Program(exchange, [LongPipelines(problem, places, role, longest) for role in ROLES])
    for pool in pools:
        program.add(pool.role, pool.alone)
    for _ in range(ROUNDS):
        value, prices = program.solve()
        over = 0.0
        for pool in pools:
            excess, found = pool.better(prices)
            over = max(over, excess)
            for columns in found:
                program.add(pool.role, columns)
        if over <= MOST_OVER:
            # GPU prices that are too low for some group by a part ``over`` are right for all when raised by it.
            return value * (1 + over)
    return None


def longest_column(kinds: int) -> int:
    """Stages of the longest pipelines that are columns."""
    lengths = [length for length in range(2, LONGEST + 1) if comb(length + kinds, kinds) <= ROWS]
    return max(lengths, default=2)


@dataclass
class _Part:
    """Pipelines of one TP size; their rates are close ones where ``known``."""

    stages: Stages
    columns: Columns
    batches: IntArray
    known: NDArray[np.bool_]


class _Pool:
    """All groups in a role that may be columns: ``alone`` those of one stage, which all are."""

    def __init__(self, problem: Problem, places: Places, role: Role, longest: int) -> None:
        self.role = role
        self.rates = GroupRates(problem, places, role)
        sizes = tp_sizes(problem, places)
        self.alone = _one_stage(self.rates, sizes)
        self.parts: list[_Part] = []
        for stages in _pipelines(places, sizes, longest) if pipelined(problem, role) else []:
            quick, batches = self.rates.quick(stages)
            keep = quick > 0
            kept = stages.rows(keep)
            columns = Columns(
                kept.gpus.astype(float), quick[keep], _summed(kept, places.halves), _summed(kept, places.beside)
            )
            self.parts.append(_Part(kept, columns, batches[keep], np.zeros(len(kept), dtype=bool)))

    def better(self, prices: Prices) -> tuple[float, list[Columns]]:
        """(the largest part by which a group is worth more than its GPUs, groups that are)."""
        over, found = 0.0, []
        for part in self.parts:
            rows = self._worthwhile(part, prices)[:CLOSE]
            new = rows[~part.known[rows]]
            if len(new):
                close = self.rates.close(part.stages.rows(new), part.batches[new], np.zeros(len(new)))
                part.columns.rates[new] = np.minimum(part.columns.rates[new], close)
                part.known[new] = True
            rows = self._worthwhile(part, prices)
            if len(rows):
                chosen = part.columns.rows(rows)
                excess, price = prices.excess(self.role, chosen)
                over = max(over, float((excess / np.maximum(price, 1e-300)).max()))
                found.append(chosen.rows(part.known[rows]).rows(slice(ADDED)))
        return over, found

    def _worthwhile(self, part: _Part, prices: Prices) -> IntArray:
        """Groups that are worth more than their price, those that are so most first."""
        excess, price = prices.excess(self.role, part.columns)
        rows = np.nonzero(excess > TOLERANCE * price + 1e-12)[0]
        return rows[np.argsort(-excess[rows], kind="stable")]


def _one_stage(rates: GroupRates, sizes: list[int]) -> Columns:
    """Groups of one stage on nodes of a kind: inside a node, or over several by the best link.

    A stage on several kinds is no faster than on either alone, and is covered by parts of both.
    """
    places = rates.places
    found: list[tuple[Slot, float, int, int]] = []
    for place in range(len(places)):
        links = {link for link in places.between[place] if link is not None}
        for tp in sizes:
            if tp <= places.width[place]:
                rate = rates.one_stage(places.types[place], tp, places.inside[place])
                found.append(((place, tp), rate, places.halves((place, tp)), places.beside((place, tp))))
            if tp > 1 and links:
                rate = max(rates.one_stage(places.types[place], tp, link) for link in links)
                found.append(((place, tp), rate, 0, tp))
    found = [column for column in found if column[1] > 0]
    cells, halves, beside = (np.zeros((len(found), len(places))) for _ in range(3))
    for at, ((place, tp), _, half, left) in enumerate(found):
        cells[at, place], halves[at, place], beside[at, place] = tp, half, left
    return Columns(cells, np.array([rate for _, rate, _, _ in found]), halves, beside)


def _summed(stages: Stages, of: Callable[[Slot], int]) -> FloatArray:
    """(V, K) a figure of slots, summed over the stages on each kind."""
    per_stage = np.zeros((len(stages.slots), len(stages.places)))
    for row, slot in enumerate(stages.slots):
        per_stage[row, slot[0]] = of(slot)
    summed: FloatArray = stages.counts @ per_stage
    return summed


def _multisets(kinds: int, length: int) -> IntArray:
    """(V, kinds) how often each kind occurs, for every choice of ``length`` of them."""
    chosen = np.array(list(combinations_with_replacement(range(kinds), length)), dtype=np.int64)
    counts = np.zeros((len(chosen), kinds), dtype=np.int64)
    for column in chosen.T:
        counts[np.arange(len(chosen)), column] += 1
    return counts


def _pipelines(places: Places, sizes: list[int], longest: int) -> list[Stages]:
    """Every pipeline of one TP size and up to ``longest`` stages."""
    found = []
    for tp in sizes:
        here = [place for place in range(len(places)) if tp <= places.width[place]]
        if not here:
            continue
        counts = np.concatenate([_multisets(len(here), length) for length in range(2, longest + 1)])
        room = np.array([places.width[place] // tp * len(places.nodes[place]) for place in here])
        counts = counts[np.all(counts <= room, axis=1)]
        if len(counts):
            found.append(Stages(places, tuple((place, tp) for place in here), counts))
    return found
