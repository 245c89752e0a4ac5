"""A workload: how long prompts and answers are, and when requests come."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MOST_TOKENS = 10**9
"""A request's tokens at most, prompt and answer each: more is a slip, and would overflow."""

_NORMAL = NormalDist()
_PLASTIC = 1.324717957244746  # the root of x³ = x + 1; its powers give the R2 low-discrepancy sequence


@dataclass(frozen=True)
class Lengths:
    """Prompt and answer lengths in tokens of n requests, equally likely: two arrays of shape (n,)."""

    inputs: IntArray
    outputs: IntArray

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Marginals:
    """Quantile tables of prompt and answer lengths, joined by a Gaussian copula.

    ``levels``, ``inputs`` and ``outputs`` have shape (k,): the length at each level of probability, 0 and 1
    included. ``rank_correlation`` is Spearman's ρ; the copula's normal correlation is 2·sin(π·ρ/6).
    """

    levels: FloatArray
    inputs: FloatArray
    outputs: FloatArray
    rank_correlation: float

    def at(self, uniforms: FloatArray) -> Lengths:
        """Lengths at points of the unit square, shape (n, 2)."""
        first, free = (_inverse_normal(column) for column in np.clip(uniforms, 1e-12, 1 - 1e-12).T)
        r = 2 * np.sin(np.pi * self.rank_correlation / 6)
        second = r * first + np.sqrt(max(0.0, 1 - r * r)) * free
        inputs = np.interp(uniforms[:, 0], self.levels, self.inputs)
        outputs = np.interp(_normal(second), self.levels, self.outputs)
        return Lengths(_whole(inputs), _whole(outputs))


@dataclass(frozen=True)
class Workload:
    """Either a fitted distribution (``marginals``) or a trace (``trace`` with ``arrivals_s``).

    ``name`` is what the user asked for: a shipped name, a file, or ``fixed:INPUT/OUTPUT``. ``mean_rps`` is the
    mean arrival rate of the trace, or of the trace that the marginals were fitted on; None where there is none.
    """

    name: str
    marginals: Marginals | None = None
    trace: Lengths | None = None
    arrivals_s: FloatArray | None = None
    mean_rps: float | None = None

    def sample(self, count: int, rng: np.random.Generator) -> Lengths:
        """``count`` requests drawn at random."""
        if self.trace is not None:
            rows = rng.integers(len(self.trace), size=count)
            return Lengths(self.trace.inputs[rows], self.trace.outputs[rows])
        assert self.marginals is not None
        return self.marginals.at(rng.random((count, 2)))

    def representative(self, count: int = 256) -> Lengths:
        """``count`` equally likely requests that stand for the workload; the same at every call.

        From a fit: the first ``count`` points of the R2 sequence. From a trace: the trace sorted by its prompt
        length, taken at even steps.
        """
        if self.trace is not None:
            order = np.lexsort((self.trace.outputs, self.trace.inputs))
            rows = order[((np.arange(count) + 0.5) * len(order) / count).astype(int)]
            return Lengths(self.trace.inputs[rows], self.trace.outputs[rows])
        assert self.marginals is not None
        steps = np.arange(1, count + 1)[:, None] * np.array([1 / _PLASTIC, 1 / _PLASTIC**2])
        return self.marginals.at((0.5 + steps) % 1.0)


def _normal(values: FloatArray) -> FloatArray:
    return np.array([_NORMAL.cdf(value) for value in values])


def _inverse_normal(levels: FloatArray) -> FloatArray:
    return np.array([_NORMAL.inv_cdf(level) for level in levels])


def _whole(lengths: FloatArray) -> IntArray:
    whole: IntArray = np.maximum(1, np.rint(lengths)).astype(np.int64)
    return whole
