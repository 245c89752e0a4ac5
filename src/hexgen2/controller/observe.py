"""What is going on: a sliding window over requests and transfers, and the frozen observation that it gives.

The window is fed with lengths and times only, never with text. It reads no clock: whoever feeds it says when.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hexgen2.specs.workload import Lengths, Workload

FloatArray = NDArray[np.float64]
REPRESENTATIVE = 256
"""Requests that stand for the observed workload, as the planner takes them."""
MOST_RECORDS = 8192
"""Requests that the window remembers at most; with more traffic it spans less time."""
PATIENCE = 5
TELLING_S = 0.02
"""Seconds that a transfer must take in the mean for its rate to say something about the link."""
LEVELS = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that was answered: when (seconds), and how many tokens it read and wrote."""

    at_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and quantiles of a length, in tokens."""

    mean: float
    p10: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(lengths: NDArray[np.int64]) -> Spread:
        """The spread of lengths; ValueError when there are none.

        >>> Spread.of(np.array([1, 2, 3])).p50
        2.0
        """
        if len(lengths) == 0:
            raise ValueError("no requests: there is nothing to describe")
        return Spread(float(lengths.mean()), *(float(level) for level in np.quantile(lengths, LEVELS)))


@dataclass(frozen=True, slots=True)
class KvReceived:
    """What an engine has received since it started: bytes, transfers, and the seconds these took, summed."""

    bytes: float = 0.0
    transfers: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class FleetState:
    """The engines at one moment: seconds that each group has been down (0: it is up), requests in flight over
    those that the plan lets the engines run at once, and requests that wait for a place."""

    down_s: Mapping[str, float]
    busy: float = 0.0
    queued: int = 0

    @property
    def up(self) -> frozenset[str]:
        return frozenset(group for group, seconds in self.down_s.items() if seconds <= 0)


@dataclass(frozen=True)
class Observation:
    """The load of the last ``span_s`` seconds and the state of the engines.

    ``arrival_rps``: requests that came, the refused ones too; ``completed_rps``: those answered.
    ``lengths``: requests that stand for the answered ones; None while there were too few. ``steady``: the
    newer half of the window looks like the older one. ``links``: bytes/s that each group could receive KV
    caches at.
    """

    at_s: float
    span_s: float
    arrival_rps: float
    completed_rps: float
    requests: int
    fleet: FleetState
    lengths: Lengths | None = None
    inputs: Spread | None = None
    outputs: Spread | None = None
    steady: bool = False
    links: Mapping[str, float] = field(default_factory=dict)

    @property
    def saturated(self) -> bool:
        """Whether more would come through if more could: requests wait, or the places are nearly all taken.

        Clients that wait for an answer before they ask again slow down with the service, so that the rate of
        arrivals alone would hide what they would ask for.
        """
        return self.fleet.queued > 0 or self.fleet.busy >= 0.9


def kv_bandwidth(received: KvReceived, span_s: float) -> float | None:
    """Bytes/s that the links into a group carry, from what it received in ``span_s`` seconds; None without any,
    and where transfers are too short to tell (their fixed cost hides the link).

    A transfer shares its link with those at the same time. In a queue with processor sharing of capacity C that
    carries λ bytes/s, the mean rate of one transfer is C − λ (M/G/1-PS), so C = rate of a transfer + λ.

    >>> kv_bandwidth(KvReceived(bytes=600.0, transfers=6, seconds=2.0), span_s=10.0)
    360.0
    """
    if received.transfers <= 0 or span_s <= 0 or received.seconds < TELLING_S * received.transfers:
        return None
    return received.bytes / received.seconds + received.bytes / span_s


class Window:
    """Requests of the last ``span_s`` seconds; the newest `MOST_RECORDS` of them.

    Where few are answered (a plan that does not suit the load answers few), lengths are taken from up to
    `PATIENCE` times as long ago, as far as they are needed.
    """

    def __init__(self, span_s: float, began_s: float, at_least: int = 50) -> None:
        """``at_least``: answered requests below which the lengths are not judged."""
        self.span_s = span_s
        self._at_least = at_least
        self._began_s = began_s
        self._arrivals: deque[float] = deque(maxlen=MOST_RECORDS)
        self._finished: deque[Finished] = deque(maxlen=MOST_RECORDS)
        self._received: deque[tuple[float, Mapping[str, KvReceived]]] = deque()

    def arrived(self, at_s: float) -> None:
        """A request came."""
        self._arrivals.append(at_s)

    def finished(self, request: Finished) -> None:
        """A request was answered."""
        self._finished.append(request)

    def received(self, at_s: float, totals: Mapping[str, KvReceived]) -> None:
        """The engines' counters of received KV caches at a moment."""
        self._received.append((at_s, dict(totals)))

    def forget(self, now_s: float) -> None:
        """Begin anew: what was seen before no longer tells of now (another plan runs)."""
        self._began_s = now_s
        self._arrivals.clear()
        self._finished.clear()
        self._received.clear()

    def observe(self, now_s: float, fleet: FleetState) -> Observation:
        """What the window shows at a moment."""
        start = max(self._began_s, now_s - self.span_s)
        while self._arrivals and self._arrivals[0] < start:
            self._arrivals.popleft()
        oldest = max(self._began_s, now_s - PATIENCE * self.span_s)
        while self._finished and (
            self._finished[0].at_s < oldest
            or (self._finished[0].at_s < start and len(self._finished) > self._at_least)
        ):
            self._finished.popleft()
        while len(self._received) > 1 and self._received[1][0] <= start:
            self._received.popleft()
        inputs = np.array([one.input_tokens for one in self._finished], dtype=np.int64)
        outputs = np.array([one.output_tokens for one in self._finished], dtype=np.int64)
        enough = len(inputs) >= self._at_least
        lengths = Lengths(np.maximum(inputs, 1), np.maximum(outputs, 1)) if enough else None
        return Observation(
            at_s=now_s,
            span_s=now_s - start,
            arrival_rps=_rate(self._arrivals, start, now_s),
            completed_rps=_rate([one.at_s for one in self._finished if one.at_s >= start], start, now_s),
            requests=len(inputs),
            fleet=fleet,
            lengths=Workload("observed", trace=lengths).representative(REPRESENTATIVE) if lengths else None,
            inputs=Spread.of(lengths.inputs) if lengths else None,
            outputs=Spread.of(lengths.outputs) if lengths else None,
            steady=enough and _steady(inputs) and _steady(outputs),
            links=self._links(),
        )

    def _links(self) -> dict[str, float]:
        if len(self._received) < 2:
            return {}
        (first_s, first), (last_s, last) = self._received[0], self._received[-1]
        found: dict[str, float] = {}
        for group, after in last.items():
            before = first.get(group, KvReceived())
            if after.bytes < before.bytes:  # it was started again in between
                before = KvReceived()
            grown = KvReceived(
                after.bytes - before.bytes,
                after.transfers - before.transfers,
                after.seconds - before.seconds,
            )
            bandwidth = kv_bandwidth(grown, last_s - first_s)
            if bandwidth is not None:
                found[group] = bandwidth
        return found


def _rate(times: Collection[float], start: float, now_s: float) -> float:
    """Events per second since ``start``; where the record is full, since its first event."""
    if len(times) == MOST_RECORDS:
        start = next(iter(times))
    return len(times) / (now_s - start) if now_s > start else 0.0


def _steady(values: FloatArray | NDArray[np.int64]) -> bool:
    """Whether the means of both halves are within 15%, or within three standard errors of their difference."""
    half = len(values) // 2
    if half == 0:
        return False
    older, newer = values[:half], values[half:]
    gap = abs(float(newer.mean() - older.mean()))
    error = math.sqrt(float(older.var()) / len(older) + float(newer.var()) / len(newer))
    return gap <= max(0.15 * float(values.mean()), 3 * error)
