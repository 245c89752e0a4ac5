"""Fit a GPU type's efficiencies to measured times: robust least squares through the cost model itself.

What is fitted is what `CostModel` then says: the same functions give the predictions here. Parameters are
fitted as logarithms, so that they stay above zero and errors are relative. Residuals are ln(predicted /
measured); the loss is quadratic for small ones and linear beyond (soft L1), so that single wild measurements do
not decide. Every parameter is also held to where it began, the more the better it is known beforehand (the
maximum a posteriori under a log-normal prior): one that the measurements say nothing about keeps its start in
place of drifting to a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hexgen2.cost import CostModel, Efficiencies, Efficiency, Layout, Profile, Settings
from hexgen2.specs.model import Model

FloatArray = NDArray[np.float64]
Phase = Literal["prefill", "decode"]

LIMITS: Mapping[str, tuple[float, float]] = {
    "compute": (0.01, 1.0),
    "attention": (0.01, 1.0),
    "memory": (0.01, 1.4),
    "kv": (0.005, 1.4),
    "link": (0.005, 1.4),
    "large_link": (0.002, 1.4),
    "large_message_bytes": (2**20, 2**30),
    "reduce_hops": (0.5, 14.0),
    "layer_overhead_s": (1e-8, 0.1),
    "step_overhead_s": (1e-7, 1.0),
    "layer_launch_s": (1e-8, 0.1),
    "prompt_overhead_s": (1e-7, 1.0),
    "sequence_overhead_s": (1e-9, 0.1),
    "request_overhead_s": (1e-7, 1.0),
}
"""What a fitted parameter may be; a parameter that ends at a limit was not determined."""

ROBUST_ABOVE = 0.05
"""ln(predicted / measured) from where on a residual counts linearly: about 5%."""

NOISE = 0.03
"""What ln(predicted / measured) scatters by where the model is right; weighs measurements against the start."""

SPREAD: Mapping[str, float] = {
    "compute": 0.25,
    "attention": 0.3,
    "memory": 0.15,
    "kv": 0.5,
    "link": 0.7,
    "large_link": 0.7,
    "large_message_bytes": 0.7,
    "reduce_hops": 1.0,
}
"""How far ln(parameter) may plausibly be from its start (one standard deviation); overheads by more, see below.
Engines read weights at 60 to 85% of the sheet and multiply at 40 to 80%; the rest is known less well."""

OVERHEAD_SPREAD = 2.0

Z95 = 1.96


@dataclass(frozen=True)
class Measured:
    """A measured time of one replica of a model.

    ``prefill``: ``batch`` prompts of ``tokens`` tokens each, all at once. ``decode``: a step of ``batch``
    sequences with ``tokens`` tokens of context each.
    """

    model: Model
    phase: Phase
    layout: Layout
    batch: int
    tokens: float
    seconds: float

    def predicted(self, cost: CostModel) -> float:
        """The cost model's time for it."""
        if self.phase == "prefill":
            return cost.prefill_seconds(self.layout, [round(self.tokens)] * self.batch)
        return cost.decode_step_seconds(self.layout, self.batch, self.batch * self.tokens)


@dataclass(frozen=True)
class Interval:
    """A fitted parameter with its 95% confidence interval (asymptotic, on the logarithm)."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the measurements say anything about it: within a factor of two."""
        return self.high < 2 * self.value


@dataclass(frozen=True)
class Fit:
    """Fitted efficiencies, the interval of each fitted parameter, and predicted / measured − 1 of each time.

    ``apart``: median absolute errors of what was fitted apart (hand-overs).
    """

    efficiency: Efficiency
    intervals: Mapping[str, Interval]
    errors: tuple[float, ...]
    apart: Mapping[str, float] = field(default_factory=dict)

    def median_error(self, measured: Sequence[Measured], phase: Phase) -> float:
        """Median of the absolute relative errors of a phase; ``measured`` is what was fitted."""
        return float(
            np.median(
                [abs(error) for one, error in zip(measured, self.errors, strict=True) if one.phase == phase]
            )
        )


def fit(
    gpu: str,
    measured: Sequence[Measured],
    start: Efficiency,
    free: Sequence[str],
    settings: Settings | None = None,
) -> Fit:
    """Fit the parameters named in ``free`` of GPU type ``gpu``; ``start`` is where they begin and what they are
    held to, and it fixes the others.

    All layouts must consist of that type alone. Host and device times compete in a maximum, so there can be
    several local optima: three descents begin with the overheads as given, at a third, and at three times that.
    ValueError with no measurement.
    """
    if not measured:
        raise ValueError("there is nothing to fit")
    settings = settings or Settings()
    held = np.array([_clipped(name, getattr(start, name)) for name in free])
    hold = NOISE / np.array([_spread(name) for name in free])
    times = np.array([one.seconds for one in measured])

    def residuals(logs: FloatArray) -> FloatArray:
        predicted = _predict(gpu, measured, _changed(start, free, logs), settings)
        return np.concatenate([np.log(predicted / times), hold * (logs - held)])

    low, high = (np.array([log(LIMITS[name][side]) for name in free]) for side in (0, 1))
    overheads = np.array([name not in SPREAD for name in free])
    descents = [
        least_squares(
            residuals,
            np.clip(held + shift * overheads, low + 1e-3, high - 1e-3),
            bounds=(low, high),
            loss="soft_l1",
            f_scale=ROBUST_ABOVE,
            max_nfev=500,
            ftol=1e-12,
            xtol=1e-10,
        )
        for shift in (0.0, -log(3), log(3))
    ]
    best = min(descents, key=lambda descent: float(descent.cost))
    efficiency = _changed(start, free, best.x)
    errors = errors_of(gpu, measured, efficiency, settings)
    return Fit(efficiency, _intervals(free, best.x, best.jac, errors), errors)


def errors_of(
    gpu: str, measured: Sequence[Measured], efficiency: Efficiency, settings: Settings | None = None
) -> tuple[float, ...]:
    """Predicted / measured − 1 of each measurement."""
    predicted = _predict(gpu, measured, efficiency, settings or Settings())
    return tuple(float(time / one.seconds - 1) for time, one in zip(predicted, measured, strict=True))


def _predict(gpu: str, measured: Sequence[Measured], efficiency: Efficiency, settings: Settings) -> FloatArray:
    profile = Profile(name="fit", source="", date="", engine="", gpus={gpu: efficiency})
    efficiencies = Efficiencies([profile])
    costs: dict[int, CostModel] = {}
    times = np.empty(len(measured))
    for place, one in enumerate(measured):
        cost = costs.get(id(one.model))
        if cost is None:
            cost = costs[id(one.model)] = CostModel(one.model, efficiencies, settings)
        times[place] = one.predicted(cost)
    return times


def _clipped(name: str, value: float | None) -> float:
    low, high = LIMITS[name]
    return log(min(max(value or low, 1.01 * low), 0.99 * high))


def _changed(start: Efficiency, free: Sequence[str], logs: FloatArray) -> Efficiency:
    changed = {name: exp(value) for name, value in zip(free, logs, strict=True)}
    if "large_link" in changed:
        changed["large_link"] = min(changed["large_link"], changed.get("link", start.link))
    return start.model_copy(update=changed)


def _intervals(
    free: Sequence[str], logs: FloatArray, jacobian: FloatArray, errors: Sequence[float]
) -> dict[str, Interval]:
    """From the Jacobian of the robustly weighted residuals of the measurements, and the spread of the start.

    The measurements' noise is taken from the median of their absolute errors (1.4826 · MAD, as of a normal
    distribution), so that outliers do not widen every interval.
    """
    noise = max(1.4826 * float(np.median(np.abs(np.log1p(errors)))), 1e-4)
    data = jacobian[: len(errors)] / noise
    held = np.diag([1 / _spread(name) ** 2 for name in free])
    covariance = np.linalg.inv(data.T @ data + held)
    found: dict[str, Interval] = {}
    for name, value, variance in zip(free, logs, np.diag(covariance), strict=True):
        factor = exp(Z95 * sqrt(float(variance)))
        found[name] = Interval(exp(value), exp(value) / factor, exp(value) * factor)
    return found


def _spread(name: str) -> float:
    return SPREAD.get(name, OVERHEAD_SPREAD)
