"""What a stage does in one cycle of a group in a role, and the memory that takes: `cost.capacity` on arrays."""

from __future__ import annotations

from functools import cached_property
from math import floor, sqrt

import numpy as np
from numpy.typing import NDArray

from hexgen2.cost.capacity import resident_tokens
from hexgen2.scheduler.bound.times import Iteration
from hexgen2.scheduler.problem import Problem
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class RoleWork:
    """The load of one role, as seen by a stage of a pipeline of S stages at b sequences.

    With fewer sequences than stages a pipeline serves no more than with one in each (docs/bound.md), so b
    counts as S at least.
    """

    def __init__(self, problem: Problem, role: Role) -> None:
        self.role = role
        self.settings = problem.cost.settings
        self.moments = problem.cost.moments(problem.lengths)
        targets = problem.targets
        self.tpot_s = None if targets is None or role == "prefill" else targets.tpot_s

    @cached_property
    def prompts(self) -> int:
        """Prompts in a prefill batch at saturation, memory apart."""
        return max(1, min(self.settings.max_batch, floor(self.settings.token_budget / self.moments.input)))

    @cached_property
    def tokens(self) -> FloatArray:
        """(max_batch + 1,) tokens of KV cache that so many sequences need at least."""
        moments, settings = self.moments, self.settings
        most = settings.max_batch + 1
        if self.role == "prefill":
            return np.full(most, float(moments.longest_input))
        mean = resident_tokens(moments, settings)
        spread = settings.headroom_sigmas * moments.context_std
        tokens = np.array([max(b * mean + spread * sqrt(b), float(moments.longest)) for b in range(most)])
        tokens[:2] = moments.longest
        if self.role == "colocated":
            tokens[2:] += round(moments.input)
        return tokens * (1 - 1e-9)

    def most(self, stages: IntArray) -> IntArray:
        """(V,) the largest batch that the settings allow."""
        most = np.full(len(stages), self.settings.max_batch, dtype=np.int64)
        if self.role == "colocated":
            per_sequence = 1 + self.moments.input / self.moments.output
            within = np.floor(stages * self.settings.token_budget / per_sequence * (1 + 1e-12))
            most = np.minimum(most, np.maximum(1, within.astype(np.int64)))
        return most

    def per_cycle(self, stages: IntArray, batch: IntArray) -> FloatArray:
        """(V,) requests that a stage serves while it works once; in decoding, parts of requests."""
        if self.role == "prefill":
            return np.full(len(batch), float(self.prompts))
        per: FloatArray = np.maximum(1.0, batch / stages) / self.moments.output
        return per

    def iterations(self, stages: IntArray, batch: IntArray) -> list[Iteration]:
        """What each stage works on in a cycle, arrays (V,)."""
        if self.role == "prefill":
            return [self._prefill(len(batch))]
        moments = self.moments
        sequences = np.maximum(batch, stages).astype(float)
        each = sequences / stages
        context, nothing = each * moments.context, np.zeros(len(batch))
        if self.role == "decode":
            return [Iteration(1.0, each, nothing, context, each)]
        part = -np.expm1(-sequences / moments.output)
        prompts = sequences / moments.output / part
        mixed = Iteration(
            part,
            (sequences + prompts * moments.input) / stages,
            prompts * moments.input_sq / stages,
            context,
            (sequences + prompts) / stages,
        )
        return [mixed, Iteration(1 - part, each, nothing, context, each)]

    def _prefill(self, count: int) -> Iteration:
        """A batch. A prompt beyond the token budget is cut, where memory is scarce into smaller pieces than the
        budget: per token none is faster than a whole budget."""
        chunks = max(1.0, self.prompts * self.moments.input / self.settings.token_budget)
        tokens, squares = self.prompts * self.moments.input, self.prompts * self.moments.input_sq
        return Iteration(
            chunks,
            np.full(count, tokens / chunks),
            np.full(count, squares / chunks),
            np.zeros(count),
            np.full(count, self.prompts / chunks),
        )
