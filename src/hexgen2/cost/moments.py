"""What the capacity formulas need to know of the lengths of requests, computed once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexgen2.specs.workload import Lengths

POINTS = 32
FEW_POINTS = 16


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of prompt length i and answer length o over equally likely requests (tokens, tokens²).

    ``context`` is the mean context of a sequence found in the decode batch at a random time. A request stays
    for o steps, with a context of i + j at step j, so long answers weigh more: E[o·i + o·(o+1)/2] / E[o].
    ``context_std`` is the standard deviation of the same. Example: one class with i = 100, o = 3 has contexts
    101, 102, 103: mean 102, standard deviation √(2/3).

    ``prompts`` and ``answers`` stand for the two distributions of lengths: the sorted lengths cut into at most
    `POINTS` (`FEW_POINTS`) equal parts, and the mean of each.
    """

    input: float
    input_sq: float
    output: float
    context: float
    context_std: float
    longest_input: int
    longest: int
    prompts: tuple[float, ...] = ()
    answers: tuple[float, ...] = ()

    @staticmethod
    def of(lengths: Lengths, weights: NDArray[np.float64] | None = None) -> Moments:
        """The moments of ``lengths``, of which request n comes with probability ``weights[n]`` / Σ weights
        (without them all are equally likely); ValueError when there is no request."""
        if len(lengths) == 0:
            raise ValueError("no requests: the lengths are empty")
        i = lengths.inputs.astype(np.float64)
        o = lengths.outputs.astype(np.float64)
        w = np.ones(len(lengths)) if weights is None else weights
        here = w > 0
        if not here.any():
            raise ValueError("no requests: all weights are zero")
        steps = float((w * o).sum())
        sum_j = o * (o + 1) / 2
        sum_jj = o * (o + 1) * (2 * o + 1) / 6
        context = float((w * (o * i + sum_j)).sum()) / steps
        context_sq = float((w * (o * i * i + 2 * i * sum_j + sum_jj)).sum()) / steps
        return Moments(
            input=float(np.average(i, weights=w)),
            input_sq=float(np.average(i * i, weights=w)),
            output=float(np.average(o, weights=w)),
            context=context,
            context_std=max(0.0, context_sq - context * context) ** 0.5,
            longest_input=int(lengths.inputs[here].max()),
            longest=int((lengths.inputs + lengths.outputs)[here].max()),
            prompts=_points(i, w, POINTS),
            answers=_points(o, w, FEW_POINTS),
        )


def _points(lengths: NDArray[np.float64], weights: NDArray[np.float64], count: int) -> tuple[float, ...]:
    """Means of ``count`` equally likely parts of the sorted lengths (fewer where there are fewer lengths)."""
    order = np.argsort(lengths, kind="stable")
    values, reached = lengths[order], np.cumsum(weights[order]) / weights.sum()
    edges = np.arange(1, min(count, len(lengths)) + 1) / min(count, len(lengths))
    # The integral of the quantile function up to each edge; its steps over one part give the part's mean.
    sums = np.cumsum(values * np.diff(reached, prepend=0.0))
    area = np.interp(edges, np.append(0.0, reached), np.append(0.0, sums))
    return tuple(float(part) for part in np.diff(area, prepend=0.0) * len(edges))
