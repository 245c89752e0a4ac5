"""The requests of a simulation: when they come and how long they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hexgen2.specs.workload import FloatArray, IntArray, Lengths, Workload


@dataclass(frozen=True)
class Requests:
    """Requests in the order of their arrival: three arrays of shape (n,), seconds and tokens."""

    arrivals_s: FloatArray
    inputs: IntArray
    outputs: IntArray

    def __post_init__(self) -> None:
        if not len(self.arrivals_s) == len(self.inputs) == len(self.outputs):
            raise ValueError("arrivals, inputs and outputs have different lengths")
        if len(self.arrivals_s) and float(np.diff(self.arrivals_s).min(initial=0.0)) < 0:
            raise ValueError("arrivals go back in time")

    def __len__(self) -> int:
        return len(self.arrivals_s)


def poisson(lengths: Lengths, rate_rps: float, rng: np.random.Generator) -> Requests:
    """These requests at a mean rate, with exponential gaps."""
    gaps = rng.exponential(1 / rate_rps, size=len(lengths))
    return Requests(np.cumsum(gaps), lengths.inputs, lengths.outputs)


def offline(lengths: Lengths) -> Requests:
    """These requests, all there at time 0."""
    return Requests(np.zeros(len(lengths)), lengths.inputs, lengths.outputs)


def replay(workload: Workload, count: int | None = None, rate_rps: float | None = None) -> Requests:
    """A trace as it came, or its first ``count`` requests, or squeezed in time to a mean of ``rate_rps``.

    ValueError when the workload has no arrival times.
    """
    if workload.trace is None or workload.arrivals_s is None:
        raise ValueError(f"workload {workload.name} has no arrival times")
    arrivals = workload.arrivals_s[:count] - workload.arrivals_s[0]
    if rate_rps is not None and len(arrivals) > 1 and arrivals[-1] > 0:
        arrivals = arrivals * ((len(arrivals) - 1) / (rate_rps * arrivals[-1]))
    return Requests(arrivals, workload.trace.inputs[:count], workload.trace.outputs[:count])
