"""How many requests per second a group of given stages serves at most, however layers are dealt: docs/bound.md.

`GroupRates.quick` deals layers in fractions and looks at memory and speed apart; `GroupRates.close` deals whole
layers under both. Neither is below the rate of any real layout of these stages; the second is dearer and nearly
exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexgen2.cost.layout import StageShape
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.stages import Slot, Stages
from hexgen2.scheduler.bound.times import Iteration, StageTimes, stage_memory
from hexgen2.scheduler.bound.work import RoleWork
from hexgen2.scheduler.problem import Problem
from hexgen2.specs.gpu import GpuType, Link
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
LEVELS = (3, 5, 10)
"""Batches that `close` looks at, in steps: from the largest down as far as smaller ones may be better."""
LEVEL_RATIO = 0.96
"""Each batch is this part of the one above, or one less."""
HALVINGS = 11
WIDEST = 3.0
"""`close` looks for cycles up to this much longer than `quick` finds, by halving."""
ROWS = 20_000
"""Groups valued at a time, so that memory stays small."""


@dataclass(frozen=True)
class _Figures:
    """(Q, V) seconds of one layer, and, in units of that: of a stage apart from its layers, of being reached
    from inside the node, from another node, and of the LM head."""

    layer: FloatArray
    fixed: FloatArray
    inner: FloatArray
    entry: FloatArray
    head: FloatArray


class GroupRates:
    """Upper bounds on the rates of groups in one role."""

    def __init__(self, problem: Problem, places: Places, role: Role) -> None:
        self.problem, self.places, self.role = problem, places, role
        self.work = RoleWork(problem, role)
        self.layers = problem.model.layers
        self._times: dict[Slot, StageTimes] = {}
        self._caps: dict[Slot, FloatArray] = {}

    def one_stage(self, gpu: GpuType, tp: int, link: Link | None) -> float:
        """Requests/s of a group that is one stage: the cost model's own figure."""
        cost, work = self.problem.cost, self.work
        layout = (StageShape(gpu, tp, self.layers, link if tp > 1 else None),)
        if self.role == "prefill":
            return cost.prefill_capacity(layout, work.moments).rps
        if self.role == "decode":
            return cost.decode_capacity(layout, work.moments, work.tpot_s).rps
        return cost.colocated_capacity(layout, work.moments, work.tpot_s).rps

    def contribution(self, slot: Slot) -> float:
        """Requests/s of the whole model that a stage of a pipeline contributes at most: R·l/L."""
        stages = np.array([2])
        batch = np.array([self.work.settings.max_batch])
        layer = self.times(slot).layer(self.work.iterations(stages, batch))
        return float((self.work.per_cycle(stages, batch) / (self.layers * layer))[0])

    def quick(self, stages: Stages) -> tuple[FloatArray, IntArray]:
        """(V,) requests/s of pipelines of two and more stages, and their largest batch; 0 where none fits."""
        rates, batches = np.zeros(len(stages)), np.zeros(len(stages), dtype=np.int64)
        for start in range(0, len(stages), ROWS):
            part = stages.rows(slice(start, start + ROWS))
            usable = (part.total >= 2) & (part.total <= self.layers)
            rows = np.nonzero(usable)[0]
            rows = rows[self._fits(part.rows(rows), np.ones(len(rows), dtype=np.int64))]
            if len(rows):
                part = part.rows(rows)
                batch = self._largest_batch(part)
                batches[start + rows] = batch
                rates[start + rows] = self._quick_rate(part, batch)
        return rates, batches

    def close(self, stages: Stages, batches: IntArray, least: FloatArray) -> FloatArray:
        """(V,) the same with whole layers, which fit beside the very batch that sets the speed.

        Where that is not above ``least`` (V,), the answer is anything not above it.
        Batches are taken in levels: of all from b' to b'' the speed is that at b'', the memory that at b'.
        """
        best = np.zeros(len(stages))
        if self.role == "prefill":
            return self.work.per_cycle(stages.total, batches) / self._whole_cycle(stages, batches, batches)
        rows, top = np.arange(len(stages)), batches
        for levels in LEVELS:
            tops = [top]
            for _ in range(levels):
                tops.append(
                    np.maximum(0, np.minimum(tops[-1] - 1, np.floor(tops[-1] * LEVEL_RATIO).astype(int)))
                )
            high, low = np.concatenate(tops[:-1]), np.concatenate(tops[1:]) + 1
            many = np.tile(rows, levels)
            real = high >= 1
            many, high, low = many[real], high[real], low[real]
            part = stages.rows(many)
            rate = self.work.per_cycle(part.total, high) / self._whole_cycle(part, high, low)
            np.maximum.at(best, many, rate)
            # Without regard to memory rates only fall with the batch: go on where they are above the best.
            rows, top = rows[tops[-1] >= 1], tops[-1][tops[-1] >= 1]
            more = self._quick_rate(stages.rows(rows), top) > np.maximum(best, least)[rows]
            rows, top = rows[more], top[more]
            if not len(rows):
                return best
        best[rows] = self._quick_rate(stages.rows(rows), top)
        return best

    def times(self, slot: Slot) -> StageTimes:
        """Times of a stage of a slot."""
        known = self._times.get(slot)
        if known is None:
            place, tp = slot
            known = self._times[slot] = StageTimes(
                self.problem.cost, self.places.types[place], tp, self.places.inside[place]
            )
        return known

    def _quick_rate(self, stages: Stages, batch: IntArray) -> FloatArray:
        rate: FloatArray = self.work.per_cycle(stages.total, batch) / self._cycle(
            stages, self._figures(stages, batch)
        )
        return rate

    def _cycle(self, stages: Stages, of: _Figures) -> FloatArray:
        """(V,) the least seconds in which every stage works once, with layers dealt in fractions.

        Stage i has l_i·τ_i + s_i ≤ T, so L ≤ Σ (T − s_i)/τ_i.
        """
        entering = np.where(stages.absent, np.inf, of.entry - of.inner)
        least = np.minimum.reduceat(entering, stages.starts, axis=0)
        reached = (stages.by_slot * of.inner).sum(axis=0)
        reached += np.where(
            stages.entries > 0, stages.entries * np.where(stages.entries > 0, least, 0.0), 0.0
        ).sum(axis=0)
        head = np.where(stages.absent, np.inf, of.head).min(axis=0)
        exempt = np.where(stages.absent, 0.0, np.maximum(of.entry, of.inner)).max(axis=0)
        # The first stage is not reached: the dearest boundary at most is none, and the rest is not negative.
        spent = (stages.by_slot * of.fixed).sum(axis=0) + head + np.maximum(0.0, reached - exempt)
        cycle: FloatArray = (self.layers + spent) / (stages.by_slot / of.layer).sum(axis=0)
        return cycle

    def _whole_cycle(self, stages: Stages, batch: IntArray, held: IntArray) -> FloatArray:
        """(V,) the same with whole layers and ``held`` sequences in memory; by halving, from below."""
        of = self._figures(stages, batch)
        low = self._cycle(stages, of)
        high = WIDEST * low
        # What a stage spends apart from layers and the layers it holds at most, in five positions: inside a
        # node, first of its node, first of all, and last of all in either case.
        spent = of.fixed + np.stack(
            [of.inner, of.entry, np.zeros_like(of.inner), of.inner + of.head, of.entry + of.head]
        )
        rooms = np.stack([self._cap(slot)[:, held] for slot in stages.slots], axis=1)[[0, 0, 1, 2, 2]]
        several = np.repeat(stages.entries > 0, np.diff(np.append(stages.starts, len(stages.slots))), axis=0)
        for _ in range(HALVINGS):
            middle = np.sqrt(low * high)
            fits = np.clip(np.floor(middle / of.layer - spent + 1e-9), 0.0, rooms)
            within, entering, ahead, behind, behind_entering = fits
            lost = np.where(stages.absent, -np.inf, entering - within)
            least = np.maximum.reduceat(lost, stages.starts, axis=0)
            total = (stages.by_slot * within).sum(axis=0)
            total += np.where(
                stages.entries > 0, stages.entries * np.where(stages.entries > 0, least, 0.0), 0.0
            ).sum(axis=0)
            first = ahead - np.where(several, entering, within)
            last = np.maximum(behind - within, behind_entering - entering)
            enough = total + _ends(stages, first, last) >= self.layers
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return low

    def _figures(self, stages: Stages, batch: IntArray) -> _Figures:
        """What stages take in a batch."""
        iterations = self.work.iterations(stages.total, batch)
        times = np.add.reduce([np.broadcast_to(item.weight, batch.shape) for item in iterations])
        tokens = np.add.reduce([item.weight * item.tokens for item in iterations])
        rows = [self._of_slot(stages, slot, iterations, times, tokens) for slot in stages.slots]
        layer, fixed, inner, entry, head = (np.stack(column) for column in zip(*rows, strict=True))
        inner = np.minimum(inner, entry)
        return _Figures(layer, fixed / layer, inner / layer, entry / layer, head / layer)

    def _of_slot(
        self, stages: Stages, slot: Slot, work: list[Iteration], times: FloatArray, tokens: FloatArray
    ) -> tuple[FloatArray, ...]:
        place = slot[0]
        of = self.times(slot)
        once, each = of.boundary(self.places.inside[place])
        inner = once * times + each * tokens
        entry = np.full(len(times), np.inf)
        for other, link in enumerate(self.places.between[place]):
            if link is not None:
                joined = stages.gpus[:, other] > (self.places.width[place] if other == place else 0)
                if joined.any():
                    once, each = of.boundary(link)
                    entry = np.where(joined, np.minimum(entry, once * times + each * tokens), entry)
        entry = np.where(np.isfinite(entry), entry, inner)
        return of.layer(work), of.fixed(work), inner, entry, of.head(work)

    def _cap(self, slot: Slot) -> FloatArray:
        """(3, max_batch + 1) the most layers of a middle, a first and a last stage by sequences in memory."""
        known = self._caps.get(slot)
        if known is None:
            gpu, cost = self.places.types[slot[0]], self.problem.cost
            ends = ((False, False), (True, False), (False, True))
            known = self._caps[slot] = np.stack(
                [
                    stage_memory(cost, gpu, slot[1], first=first, last=last).layers(self.work.tokens)
                    for first, last in ends
                ]
            )
        return known

    def _fits(self, stages: Stages, batch: IntArray) -> BoolArray:
        """(V,) whether the stages hold all layers with so many sequences in memory."""
        middle, first, last = np.stack([self._cap(slot)[:, batch] for slot in stages.slots], axis=1)
        total = (stages.by_slot * middle).sum(axis=0)
        fits: BoolArray = total + _ends(stages, first - middle, last - middle) >= self.layers
        return fits

    def _largest_batch(self, stages: Stages) -> IntArray:
        """(V,) the largest batch in memory, settings and TPOT target, of groups that hold one sequence."""
        if self.role == "prefill":
            return np.ones(len(stages), dtype=np.int64)
        found = _highest(self.work.most(stages.total), lambda batch: self._fits(stages, batch))
        target = self.work.tpot_s
        if target is not None:
            limit = target * (1 + 1e-9)
            slow = _highest(
                found,
                lambda batch: self._cycle(stages, self._figures(stages, batch)) * stages.total <= limit,
            )
            # With fewer sequences than stages a token may take less than a whole round.
            found = np.maximum(slow, np.minimum(found, stages.total))
        return found


def _ends(stages: Stages, first: FloatArray, last: FloatArray) -> FloatArray:
    """(V,) layers that a group gains at most by one stage being its first and another one its last (Q, V)."""
    first, last = np.where(stages.absent, -np.inf, first), np.where(stages.absent, -np.inf, last)
    slot, group = last.argmax(axis=0), np.arange(len(stages))
    most = last[slot, group]
    last[slot, group] = -np.inf
    # The slot that gains most as the last has to leave that to another one where its only stage is the first.
    other = np.where(stages.by_slot[slot, group] > 1, most, last.max(axis=0))
    same = np.arange(len(first))[:, None] == slot
    gained: FloatArray = (first + np.where(same, other, most)).max(axis=0)
    return gained


def _highest(most: IntArray, holds: Callable[[IntArray], BoolArray]) -> IntArray:
    """(V,) the largest batch from 2 to ``most`` that ``holds``, or 1; above one that does not none does."""
    low, high = np.ones(len(most), dtype=np.int64), most + 1
    while np.any(high - low > 1):
        middle = np.maximum(1, (low + high) // 2)
        good = holds(middle)
        low, high = np.where(good, middle, low), np.where(good, high, np.maximum(middle, low + 1))
    return low
