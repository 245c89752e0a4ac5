"""The counters of /metrics at one moment, as numbers: what the live page and `hexgen2 top` are worked out from.

They are read from the same metrics that Prometheus sees, so the page and a dashboard never disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import Metric

Buckets = dict[float, float]
"""Upper edge of a histogram's bucket (seconds) → observations up to it, summed over the engines."""
Ends = tuple[str, str]


@dataclass(frozen=True)
class Reading:
    """Counters since the start, and gauges, at ``at_s`` (monotonic seconds).

    ``statuses``: requests by HTTP status (or `cancelled`); ``routes``: by (prefill group or "", answering one);
    ``failed``: requests that an engine failed, by (group, kind); ``broken``: streams cut off, by reason;
    ``changes``: of the plan, by action.
    """

    at_s: float
    statuses: Mapping[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    in_flight: float = 0.0
    queued: float = 0.0
    ttft: Buckets = field(default_factory=dict)
    tpot: Buckets = field(default_factory=dict)
    routes: Mapping[Ends, float] = field(default_factory=dict)
    up: Mapping[str, bool] = field(default_factory=dict)
    busy: Mapping[str, float] = field(default_factory=dict)
    load: Mapping[str, float] = field(default_factory=dict)
    kv_used: Mapping[str, float] = field(default_factory=dict)
    waiting: Mapping[str, float] = field(default_factory=dict)
    tripped: Mapping[str, bool] = field(default_factory=dict)
    restarts: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[Ends, float] = field(default_factory=dict)
    retries: float = 0.0
    migrations: float = 0.0
    broken: Mapping[str, float] = field(default_factory=dict)
    cancelled: float = 0.0
    changes: Mapping[str, float] = field(default_factory=dict)
    capacity_rps: float | None = None
    best_rps: float | None = None

    @property
    def answered(self) -> float:
        """Requests answered whole."""
        return sum(count for status, count in self.statuses.items() if status.startswith("2"))

    @property
    def refused(self) -> float:
        """Requests sent away: too many of them, or nothing to serve them with."""
        return self.statuses.get("429", 0.0) + self.statuses.get("503", 0.0)

    @property
    def errors(self) -> float:
        """Requests that failed here: 5xx other than a refusal."""
        return sum(n for status, n in self.statuses.items() if status.startswith("5") and status != "503")


def read(families: Iterable[Metric], at_s: float) -> Reading:
    """A reading from the metric families of a registry (`CollectorRegistry.collect`)."""
    found = _Found()
    for family in families:
        take = found.takers.get(family.name)
        if take is not None:
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # as a whole registry has them
                    take(sample.name, sample.labels, float(sample.value))
    numbers = found.numbers
    return Reading(
        at_s,
        statuses=found.by_one["requests"],
        tokens=numbers.get("output_tokens", 0.0),
        in_flight=numbers.get("requests_in_flight", 0.0),
        queued=numbers.get("requests_queued", 0.0),
        ttft=found.buckets["time_to_first_token_seconds"],
        tpot=found.buckets["time_per_output_token_seconds"],
        routes=found.by_two["route_requests"],
        up={group: value > 0 for group, value in found.by_one["engine_up"].items()},
        busy=found.by_one["engine_in_flight"],
        load=found.by_one["engine_load"],
        kv_used=found.by_one["engine_kv_used"],
        waiting=found.by_one["engine_second_legs_waiting"],
        tripped={group: value > 0 for group, value in found.by_one["engine_breaker_open"].items()},
        restarts=found.by_one["engine_restarts"],
        failed=found.by_two["engine_failures"],
        retries=numbers.get("retries", 0.0),
        migrations=numbers.get("migrations", 0.0),
        broken=found.by_one["streams_broken_off"],
        cancelled=numbers.get("requests_cancelled", 0.0),
        changes=found.by_one["plan_changes"],
        capacity_rps=numbers.get("plan_capacity_rps"),
        best_rps=numbers.get("best_plan_rps"),
    )


_NUMBERS = (
    "output_tokens",
    "requests_in_flight",
    "requests_queued",
    "retries",
    "migrations",
    "requests_cancelled",
    "plan_capacity_rps",
    "best_plan_rps",
)
_BY_ONE = {
    "requests": "status",
    "engine_up": "group",
    "engine_in_flight": "group",
    "engine_load": "group",
    "engine_kv_used": "group",
    "engine_second_legs_waiting": "group",
    "engine_breaker_open": "group",
    "engine_restarts": "group",
    "streams_broken_off": "reason",
    "plan_changes": "action",
}
_BY_TWO = {"route_requests": ("prefill", "target"), "engine_failures": ("group", "kind")}
_BUCKETS = ("time_to_first_token_seconds", "time_per_output_token_seconds")
SAMPLES = tuple(
    f"hexgen2:{name}{end}"
    for names, ends in (((*_NUMBERS, *_BY_ONE, *_BY_TWO), ("", "_total")), (_BUCKETS, ("_bucket",)))
    for name in names
    for end in ends
)
"""Names of the samples that a reading is made of; other metrics need not be collected for it."""
Taker = Callable[[str, Mapping[str, str], float], None]


class _Found:
    """What is being read; counts of labels that are not told apart are summed."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self.by_one: dict[str, dict[str, float]] = {name: {} for name in _BY_ONE}
        self.by_two: dict[str, dict[Ends, float]] = {name: {} for name in _BY_TWO}
        self.buckets: dict[str, Buckets] = {name: {} for name in _BUCKETS}
        self.takers: dict[str, Taker] = {}
        self.takers |= {f"hexgen2:{name}": self._number(name) for name in _NUMBERS}
        self.takers |= {f"hexgen2:{name}": self._one(name, label) for name, label in _BY_ONE.items()}
        self.takers |= {f"hexgen2:{name}": self._two(name, *labels) for name, labels in _BY_TWO.items()}
        self.takers |= {f"hexgen2:{name}": self._bucket(name) for name in _BUCKETS}

    def _number(self, name: str) -> Taker:
        def take(_: str, __: Mapping[str, str], value: float) -> None:
            self.numbers[name] = self.numbers.get(name, 0.0) + value

        return take

    def _one(self, name: str, label: str) -> Taker:
        counts = self.by_one[name]

        def take(_: str, labels: Mapping[str, str], value: float) -> None:
            key = labels[label]
            counts[key] = counts.get(key, 0.0) + value

        return take

    def _two(self, name: str, first: str, second: str) -> Taker:
        counts = self.by_two[name]

        def take(_: str, labels: Mapping[str, str], value: float) -> None:
            key = labels[first], labels[second]
            counts[key] = counts.get(key, 0.0) + value

        return take

    def _bucket(self, name: str) -> Taker:
        counts = self.buckets[name]

        def take(sample: str, labels: Mapping[str, str], value: float) -> None:
            if sample.endswith("_bucket"):
                edge = float(labels["le"])
                counts[edge] = counts.get(edge, 0.0) + value

        return take


def quantile(before: Buckets, after: Buckets, part: float) -> float | None:
    """The quantile of what was observed between two readings, evened out inside its bucket as Prometheus does;
    the last finite edge where it lies above that. None where nothing was observed.

    >>> quantile({}, {1.0: 5.0, 2.0: 10.0, float("inf"): 10.0}, 0.75)
    1.5
    """
    edges = sorted(after)
    counts = [after[edge] - before.get(edge, 0.0) for edge in edges]
    if not counts or counts[-1] <= 0:
        return None
    rank, low, below = part * counts[-1], 0.0, 0.0
    for edge, count in zip(edges, counts, strict=True):
        if count >= rank and count > below:
            if edge == float("inf"):
                return low
            return low + (edge - low) * (rank - below) / (count - below)
        low, below = edge, count
    return low
