"""Waiting: a server that takes all waiting requests as one batch, and a batch of sequences that come and go.

Pure formulas of rates and seconds; `cost.goodput` puts a layout's figures into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erfc, exp, expm1, inf, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rounds:
    """A batch server's rounds (the time until the next batch can begin) in the long run.

    ``mean``, ``square``: first and second moment of a round in seconds; ``empty``: the part of rounds in which
    nothing comes; ``busy``: the probability that a request finds a round under way; ``lag``: how much longer
    than a batch a round is in the mean.
    """

    mean: float
    square: float
    empty: float
    busy: float
    lag: float = 0.0

    @property
    def seen(self) -> float:
        """Mean length of the round that a request falls into: long rounds are met more often."""
        return self.square / self.mean


@dataclass(frozen=True, slots=True)
class BatchServer:
    """A server whose batches cost ``fixed_s`` and what their requests add: ``mean_s`` each in the mean, second
    moment ``square_s``.

    Where no request waits it stands still (``idle_s`` None) or goes on in rounds of ``idle_s`` (decoding). With
    ``stages`` > 1 it is a pipeline, whose batches take at most ``full_s``.
    """

    fixed_s: float
    mean_s: float
    square_s: float
    idle_s: float | None = None
    stages: int = 1
    full_s: float = inf

    def rounds(self, rate: float) -> Rounds | None:
        """Rounds under Poisson arrivals; None when the server cannot keep up.

        A batch X takes what came in the round Z before. Work that comes in Z has mean λ·m·Z and variance
        λ·m₂·Z, so with p = P(nothing comes in a round) and ρ = λ·m

            E[X] = fixed + p·m + ρ·E[Z]
            E[X²] = fixed² + p·(2·fixed·m + m₂) + (2·fixed·ρ + λ·m₂)·E[Z] + ρ²·E[Z²]

        where after an empty round the server waits for a request and serves it alone. p is E[e^(−λZ)] with Z
        taken as gamma-distributed. In a single server Z = X; without fixed time this gives the mean wait of the
        M/G/1 queue (Pollaczek–Khinchine). It is the queue with gated service (Takagi, Queueing Analysis vol. 1,
        1991, chapter 5) to the second moment.

        In a pipeline of S stages a batch moves on when the batches before it have: a round lasts as long as the
        longest of S batches, E[Z] = E[X] + k·σ with k from the order statistics of the normal law and the
        coefficient of variation of the single server. The batches of a loaded group are full and alike, so σ is
        taken to fall as E[X] nears ``full_s``; that is a heuristic.
        """
        load = rate * self.mean_s
        if load >= 1:
            return None
        fixed, mean, square = self.fixed_s, self.mean_s, self.square_s
        empty = exp(-rate * (fixed + mean))
        base = x = xx = 0.0
        last: tuple[float, float] | None = None
        for _ in range(ROUNDS):
            if self.idle_s is None:
                base = fixed + empty * mean
                base_square = fixed * fixed + empty * (2 * fixed * mean + square)
            else:
                base = empty * self.idle_s + (1 - empty) * fixed
                base_square = empty * self.idle_s**2 + (1 - empty) * fixed * fixed
            x = base / (1 - load)
            xx = max(x * x, (base_square + (2 * fixed * load + rate * square) * x) / (1 - load * load))
            spread = xx / (x * x) - 1
            after = exp(-log1p(rate * x * spread) / spread) if spread > 1e-6 else exp(-rate * x)
            gap = after - empty
            if abs(gap) < PRECISE:
                break
            # ``after`` falls with ``empty``: the secant through the last two.
            straight = last is not None and last[1] != gap
            change = gap * (empty - last[0]) / (last[1] - gap) if straight and last else gap / 2
            last = (empty, gap)
            empty = min(max(empty + change, empty / 4), 1 - (1 - empty) / 4)
        z, zz, lag = x, xx, 0.0
        if self.stages > 1 and x < self.full_s:
            # x·(1 − ρ) = base + s·x·(1 − x/full)
            spread = xx / (x * x) - 1
            extra, narrower = _LARGEST[min(self.stages, len(_LARGEST)) - 1]
            s = load * extra * sqrt(spread)
            slope = 1 - load - s
            longer = 2 * base / (slope + sqrt(slope * slope + 4 * s * base / self.full_s))
            deviation = longer * sqrt(spread) * (1 - longer / self.full_s)
            lag = extra * deviation
            z = longer + lag
            zz = z * z + narrower * deviation * deviation
        busy = 1.0 if self.idle_s is not None else z / (z + empty / rate)
        return Rounds(z, zz, empty, busy, lag)


_LARGEST = (
    (0.0, 1.0),
    (0.5642, 0.6817),
    (0.8463, 0.5595),
    (1.0294, 0.4917),
    (1.1630, 0.4475),
    (1.2672, 0.4159),
)
"""Mean and variance of the largest of 1, 2, … standard normal values."""
ROUNDS = 40
PRECISE = 3e-4


def stretched_exceeds(
    work_s: float, rate: float, mean_s: float, square_s: float, limit_s: float, vary: float = 0.0
) -> float:
    """P(L > limit) for the time L in which ``work_s`` of work gets done beside interruptions that come at
    ``rate`` and take ``mean_s`` (second moment ``square_s``) each, also while others last.

    This is the delay busy period of the M/G/1 queue: E[L] = w/(1−ρ), Var[L] = w·λ·m₂/(1−ρ)³ (Takagi 1991,
    section 1.2), as an inverse Gaussian law, the time in which Brownian motion with these figures comes down by
    w. Without an interruption, with probability e^(−λw), L is w exactly. ``vary`` is the coefficient of
    variation of the work itself, which is large when interruptions are many: the deviations are added up.
    """
    if work_s >= limit_s:
        return 1.0
    load = rate * mean_s
    if load >= 1:
        return 1.0
    if rate <= 0 or work_s <= 0:
        return 0.0
    mean = work_s / (1 - load)
    deviation = sqrt(work_s * rate * square_s / (1 - load) ** 3) + vary * mean
    shape = mean**3 / deviation**2
    ratio = sqrt(shape / limit_s)
    first = _normal_tail(ratio * (limit_s / mean - 1))
    exponent = 2 * shape / mean
    below = ratio * (limit_s / mean + 1)
    second = exp(exponent) * _normal_tail(below) if exponent < 300 else 0.0
    return min(max(0.0, first - second), -expm1(-rate * work_s))


def full_probability(rate: float, seconds_each: FloatArray) -> float:
    """P(a request finds all places taken) where n requests in service take ``seconds_each[n − 1]`` each, were
    they always n; 1 when the places cannot keep up.

    Sequences of one batch advance together, at a speed that depends on their number: generalised processor
    sharing, whose number in service has P(n) ∝ Π λ·s(k)/k for every law of the lengths (Cohen, The multiple
    phase service network with generalized processor sharing, Acta Informatica 12, 1979). With B places those
    beyond wait in line, so the ratio of successive probabilities stays λ·s(B)/B there, as in Erlang's C
    formula, which this is when s does not depend on n.
    """
    places = len(seconds_each)
    ratio = rate * float(seconds_each[-1]) / places
    if ratio >= 1:
        return 1.0
    logs = np.cumsum(np.log(rate * seconds_each / np.arange(1, places + 1)))
    peak = max(0.0, float(logs.max()))
    weights = np.exp(logs - peak)
    waiting = float(weights[-1]) / (1 - ratio)  # all places taken, and any number in line
    return waiting / (exp(-peak) + float(weights[:-1].sum()) + waiting)


def _normal_tail(value: float) -> float:
    return 0.5 * erfc(value / sqrt(2))


def attained(slack_s: FloatArray, busy: float, mean: float, deviation: float) -> float:
    """Part of equally likely requests whose wait stays within their slack (seconds each; negative: too late
    even without a wait); they wait with probability ``busy``, then with this mean and standard deviation.

    The wait is a shifted exponential: waits have exponential tails (Cramér–Lundberg); a deviation below the
    mean is met by a start later than zero, one above it counts as the mean, which keeps the mean right.
    """
    within = slack_s[slack_s >= 0]
    scale = max(1e-12, min(mean, deviation))
    late = np.exp(-np.maximum(0.0, within - (mean - scale)) / scale).sum()
    return float(len(within) - busy * late) / len(slack_s)
