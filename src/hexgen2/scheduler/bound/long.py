"""Pipelines longer than those that are looked at one by one: what each stage contributes (docs/bound.md).

With x sequences in each of S stages, R·(L + Σ (s_i + u_i)/τ_i) ≤ (x / o)·Σ 1/τ_i, where u_i is what a stage
other than the first takes to be reached. For S above some length the sum on the left is at least a constant, so
stages contribute additively. Their sequences need memory: over the stages Σ (t·M − x·(kv + W/max_batch)) ≥ 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.bound.columns import Columns
from hexgen2.scheduler.bound.groups import pipelined, tp_sizes
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.rates import GroupRates
from hexgen2.scheduler.bound.stages import Slot
from hexgen2.scheduler.bound.times import held_bytes, pipeline_memory
from hexgen2.scheduler.problem import Problem
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]
LEVEL_RATIO = 1.08


class LongPipelines:
    """Stages of pipelines of more than ``longest`` stages in a role, as variables of the linear program.

    ``columns``: one stage each and the requests/s it contributes; ``memory`` (M, V): rows of bytes, whose sums
    over the stages in use are at most 0.
    """

    def __init__(self, problem: Problem, places: Places, role: Role, longest: int) -> None:
        self.problem, self.places, self.role = problem, places, role
        self.least = longest + 1
        self._rates = GroupRates(problem, places, role)
        rows: list[tuple[Slot, float, int, float]] = []
        self.levels = 0
        if pipelined(problem, role) and self.least <= problem.model.layers:
            rows = list(self._stages())
        cells = np.zeros((len(rows), len(places)))
        self.memory = np.zeros((self.levels, len(rows)))
        halves, beside = np.zeros((len(rows), len(places))), np.zeros((len(rows), len(places)))
        for at, (slot, _, level, bytes_) in enumerate(rows):
            cells[at, slot[0]] = slot[1]
            halves[at, slot[0]], beside[at, slot[0]] = places.halves(slot), places.beside(slot)
            if level >= 0:
                self.memory[level, at] = bytes_
        self.columns = Columns(cells, np.array([rate for _, rate, _, _ in rows]), halves, beside)

    def _stages(self) -> Iterator[tuple[Slot, float, int, float]]:
        """(slot, requests/s, row of memory or -1, bytes short)."""
        sizes = tp_sizes(self.problem, self.places)
        by_size = [
            [(place, tp) for place in range(len(self.places)) if tp <= self.places.width[place]] for tp in sizes
        ]
        for slots in filter(None, by_size):
            for low, high in self._batches():
                row = -1
                if low > 0:
                    row, self.levels = self.levels, self.levels + 1
                for slot, rate in zip(slots, self._contributed(slots, high), strict=True):
                    yield slot, rate, row, 0.0 if row < 0 else -self._spare(slot, low)

    def _batches(self) -> Iterator[tuple[float, float]]:
        """(lower, upper] ends of sequences per stage; up to one asks for no memory: some may have none."""
        if self.role == "prefill":
            yield 0.0, 1.0
            return
        work = self._rates.work
        most = max(1.0, work.settings.max_batch / self.least)
        if self.role == "colocated":
            prompt = work.moments.input / work.moments.output
            most = max(1.0, min(most, work.settings.token_budget / (1 + prompt)))
        low, high = 0.0, 1.0
        while low < most:
            yield low, min(high, most)
            low, high = high, high * LEVEL_RATIO

    def _contributed(self, slots: list[Slot], each: float) -> list[float]:
        """Requests/s that stages contribute with so many sequences in each."""
        work = self._rates.work
        # As many sequences in all as may be: the more there are, the fewer iterations pass without a prompt.
        stages, batch = np.array([work.settings.max_batch / each]), np.array([work.settings.max_batch])
        iterations = work.iterations(stages, batch)
        times = float(sum(np.sum(item.weight) for item in iterations))
        tokens = float(sum(np.sum(item.weight * item.tokens) for item in iterations))
        layers, spent, exempt = [], [], []
        for slot in slots:
            of = self._rates.times(slot)
            layer = float(of.layer(iterations)[0])
            if self.role == "colocated":
                decoding = replace(iterations[-1], weight=1.0)
                layer = float(of.layer_of_any_batch(iterations, decoding)[0])
            inner, entry = self._reached(slot, times, tokens)
            on_node = (
                self.places.width[slot[0]] // slot[1]
            )  # of so many stages one at least is entered from afar
            layers.append(layer)
            spent.append((float(of.fixed(iterations)[0]) + inner + (entry - inner) / on_node) / layer)
            exempt.append(entry / layer)
        whole = self.problem.model.layers + max(0.0, self.least * min(spent) - max(exempt))
        served = float(work.per_cycle(stages, batch)[0])
        return [served / (whole * layer) for layer in layers]

    def _reached(self, slot: Slot, times: float, tokens: float) -> tuple[float, float]:
        """Seconds in which a stage receives hidden states at least: from its node, and from another node."""
        of = self._rates.times(slot)
        found = []
        for links in ([self.places.inside[slot[0]]], self.places.between[slot[0]]):
            reached = [of.boundary(link) for link in links if link is not None]
            found.append(min((once * times + per * tokens for once, per in reached), default=np.inf))
        inner, entry = found
        if not np.isfinite(entry):
            entry = inner  # a single node
        return min(inner, entry), entry

    def _spare(self, slot: Slot, each: float) -> float:
        """t·M − x·(kv + W / max_batch): what a stage has over the memory that x sequences ask of it."""
        cost, widest = self.problem.cost, max(tp_sizes(self.problem, self.places))
        usable = pipeline_memory(cost, self.places.types[slot[0]], widest)
        return slot[1] * usable - each * held_bytes(cost, self._rates.work.moments)
