"""What the readings say about the last seconds and minutes, kept within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from hexgen2.coordinator.live.reading import Ends, Reading, quantile

RATE_S, SHARE_S = 10.0, 60.0
"""Seconds that rates and latencies, and shares of routes, are taken over."""
FINE, COARSE, COARSE_EVERY = 300, 360, 10
"""Samples kept of each second, and of each tenth one: five minutes and an hour."""
LEAST_ROUTED = 5
"""Requests below which nothing is said about shares."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The service at one moment: ``at`` is the time of day (seconds since 1970), rates are per second over the
    last `RATE_S`, latencies are seconds (None: no answer in that time)."""

    seq: int
    at: float
    throughput_rps: float = 0.0
    output_tokens_per_s: float = 0.0
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p99_s: float | None = None
    in_flight: float = 0.0
    queued: float = 0.0
    refused_rps: float = 0.0
    errors_rps: float = 0.0
    capacity_rps: float | None = None


COLUMNS = tuple(field.name for field in fields(Sample))


class History:
    """Readings of the last minute, and samples of the last five minutes and of the last hour."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque()
        self._fine: deque[Sample] = deque(maxlen=FINE)
        self._coarse: deque[Sample] = deque(maxlen=COARSE)

    @property
    def last(self) -> Sample | None:
        return self._fine[-1] if self._fine else None

    @property
    def reading(self) -> Reading | None:
        """The newest reading."""
        return self._readings[-1] if self._readings else None

    def add(self, reading: Reading, at: float) -> Sample:
        """Take in a reading made at a time of day."""
        self._readings.append(reading)
        while len(self._readings) > 2 and self._readings[1].at_s <= reading.at_s - SHARE_S:
            self._readings.popleft()
        seq = self._fine[-1].seq + 1 if self._fine else 1
        sample = _sample(seq, at, self._before(RATE_S), reading)
        self._fine.append(sample)
        if seq % COARSE_EVERY == 1:
            self._coarse.append(sample)
        return sample

    def routed(self) -> dict[Ends, float]:
        """Requests/s along each route over the last `SHARE_S`."""
        if len(self._readings) < 2:
            return {}
        first, last = self._readings[0], self._readings[-1]
        span = last.at_s - first.at_s
        return {
            ends: (count - first.routes.get(ends, 0.0)) / span
            for ends, count in last.routes.items()
            if count > first.routes.get(ends, 0.0)
        }

    def shares(self) -> Mapping[Ends, float]:
        """Each route's part of the requests of the last `SHARE_S`; nothing where they are too few to tell."""
        if len(self._readings) < 2:
            return {}
        rates = self.routed()
        total = sum(rates.values())
        if total * (self._readings[-1].at_s - self._readings[0].at_s) < LEAST_ROUTED:
            return {}
        return {ends: rate / total for ends, rate in rates.items()}

    def columns(self, after: int) -> dict[str, dict[str, list[float | None]]]:
        """Samples newer than ``after``, column by column: `fine` (each second) and `coarse` (each tenth)."""
        return {"fine": _columns(self._fine, after), "coarse": _columns(self._coarse, after)}

    def _before(self, span_s: float) -> Reading:
        """The newest reading that is at least so old; the oldest where none is."""
        newest = self._readings[-1].at_s
        for reading in reversed(self._readings):
            if reading.at_s <= newest - span_s:
                return reading
        return self._readings[0]


def _sample(seq: int, at: float, before: Reading, now: Reading) -> Sample:
    span = now.at_s - before.at_s

    def rate(old: float, new: float) -> float:
        return (new - old) / span if span > 0 else 0.0

    return Sample(
        seq,
        at,
        throughput_rps=rate(before.answered, now.answered),
        output_tokens_per_s=rate(before.tokens, now.tokens),
        ttft_p50_s=quantile(before.ttft, now.ttft, 0.5),
        ttft_p99_s=quantile(before.ttft, now.ttft, 0.99),
        tpot_p50_s=quantile(before.tpot, now.tpot, 0.5),
        tpot_p99_s=quantile(before.tpot, now.tpot, 0.99),
        in_flight=now.in_flight,
        queued=now.queued,
        refused_rps=rate(before.refused, now.refused),
        errors_rps=rate(before.errors, now.errors),
        capacity_rps=now.capacity_rps,
    )


def _columns(samples: Iterable[Sample], after: int) -> dict[str, list[float | None]]:
    rows: Sequence[tuple[float | None, ...]] = [astuple(sample) for sample in samples if sample.seq > after]
    return {name: [_short(row[place]) for row in rows] for place, name in enumerate(COLUMNS)}


def _short(value: float | None) -> float | None:
    """Figures of a chart need no more digits."""
    return float(f"{value:.6g}") if isinstance(value, float) and value < 1e6 else value
