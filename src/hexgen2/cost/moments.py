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
    def of(lengths: Lengths) -> Moments:
        """The moments of ``lengths``; ValueError when it is empty."""
        if len(lengths) == 0:
            raise ValueError("no requests: the lengths are empty")
        i = lengths.inputs.astype(np.float64)
        o = lengths.outputs.astype(np.float64)
        steps = float(o.sum())
        sum_j = o * (o + 1) / 2
        sum_jj = o * (o + 1) * (2 * o + 1) / 6
        context = float((o * i + sum_j).sum()) / steps
        context_sq = float((o * i * i + 2 * i * sum_j + sum_jj).sum()) / steps
        return Moments(
            input=float(i.mean()),
            input_sq=float((i * i).mean()),
            output=float(o.mean()),
            context=context,
            context_std=max(0.0, context_sq - context * context) ** 0.5,
            longest_input=int(lengths.inputs.max()),
            longest=int((lengths.inputs + lengths.outputs).max()),
            prompts=_points(i, POINTS),
            answers=_points(o, FEW_POINTS),
        )


def _points(lengths: NDArray[np.float64], count: int) -> tuple[float, ...]:
    parts = np.array_split(np.sort(lengths), min(count, len(lengths)))
    return tuple(float(part.mean()) for part in parts)
