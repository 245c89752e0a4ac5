"""What Prometheus sees at /metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hexgen2.coordinator.admission import Admission
from hexgen2.coordinator.desk import Counted, Timed
from hexgen2.coordinator.fleet import Fleet
from hexgen2.coordinator.kv_totals import KvTotals
from hexgen2.coordinator.traffic import Listener, Served

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)

_BY_GROUP = ("group", "role")


class Metrics:
    """All of a coordinator's metrics, in a registry of its own so that several can live in one process."""

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self.listener: Listener | None = None
        self._children: dict[tuple[Counted, tuple[str, ...]], Counter] = {}
        self._timers: dict[tuple[Timed, tuple[str, ...]], Histogram] = {}
        self.registry = CollectorRegistry()
        self.ttft = self._histogram(
            "time_to_first_token_seconds",
            "From the request's arrival to the first token sent (streams only)",
            _TTFT_BUCKETS,
        )
        self.tpot = self._histogram(
            "time_per_output_token_seconds",
            "Mean time between a stream's tokens after the first",
            _TPOT_BUCKETS,
        )
        self.e2e = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last byte", _E2E_BUCKETS
        )
        self.leg_seconds = self._histogram(
            "leg_seconds", "Time one engine spent on its part of a request", _E2E_BUCKETS
        )
        self.requests = Counter(
            "hexgen2:requests", "Requests by outcome", ("endpoint", "status"), registry=self.registry
        )
        self.output_tokens = Counter("hexgen2:output_tokens", "Tokens sent to clients", registry=self.registry)
        self.in_flight = Gauge("hexgen2:requests_in_flight", "Requests being served", registry=self.registry)
        self.routed = Counter(
            "hexgen2:route_requests",
            "Requests sent along each route",
            ("prefill", "target"),
            registry=self.registry,
        )
        self.one_engine = Counter(
            "hexgen2:one_engine_requests",
            "Requests that cannot be split over two engines, by reason",
            ("reason",),
            registry=self.registry,
        )
        self.without_kv = Counter(
            "hexgen2:legs_without_kv",
            "Second legs without a KV cache, by reason: the decode engine computed the prompt itself",
            ("reason",),
            registry=self.registry,
        )
        self.failures = Counter(
            "hexgen2:engine_failures",
            "Requests that an engine failed, by kind",
            ("group", "role", "kind"),
            registry=self.registry,
        )
        self.retries = Counter(
            "hexgen2:retries",
            "Requests started again on another route before any byte was sent",
            registry=self.registry,
        )
        self.migrations = Counter(
            "hexgen2:migrations",
            "Streams taken up by another engine after theirs was lost",
            registry=self.registry,
        )
        self.replays = Counter(
            "hexgen2:replays",
            "Of these, streams whose request was run anew since their token ids do not say enough",
            registry=self.registry,
        )
        self.restarts = Counter(
            "hexgen2:engine_restarts",
            "Times that an engine was started again after it ended",
            _BY_GROUP,
            registry=self.registry,
        )
        self.workers = Gauge(
            "hexgen2:workers_up", "Worker processes that accept clients", registry=self.registry
        )
        self.worker_requests = Counter(
            "hexgen2:worker_requests",
            "Generation requests by the worker process that they came to",
            ("worker",),
            registry=self.registry,
        )
        self.worker_restarts = Counter(
            "hexgen2:worker_restarts",
            "Times that a worker process was started again after it ended",
            registry=self.registry,
        )
        self.broken = Counter(
            "hexgen2:streams_broken_off",
            "Streams that ended with an error event, by why they could not go on",
            ("reason",),
            registry=self.registry,
        )
        self.cancelled = Counter(
            "hexgen2:requests_cancelled", "Requests whose client went away", registry=self.registry
        )
        self._fleet = FleetCollector(fleet, admission)
        self.registry.register(self._fleet)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"hexgen2:{name}", text, _BY_GROUP, buckets=buckets, registry=self.registry)

    # As a `desk.Meter`

    def count(self, what: Counted, *labels: str, by: float = 1.0) -> None:
        counter = self._children.get((what, labels))
        if counter is None:
            made: Counter = getattr(self, what)
            counter = self._children[what, labels] = made.labels(*labels) if labels else made
        counter.inc(by)

    def time(self, what: Timed, seconds: float, *labels: str) -> None:
        histogram = self._timers.get((what, labels))
        if histogram is None:
            made: Histogram = getattr(self, what)
            histogram = self._timers[what, labels] = made.labels(*labels)
        histogram.observe(seconds)

    def serving(self, requests: int) -> None:
        self.in_flight.set(requests)

    @property
    def listens(self) -> bool:
        return self.listener is not None

    def arrived(self) -> None:
        if self.listener is not None:
            self.listener.arrived()

    def served(self, request: Served) -> None:
        if self.listener is not None:
            self.listener.served(request)

    def some(self, names: Iterable[str]) -> Iterator[Metric]:
        """Only the samples of these names, and what the engines are like now."""
        yield from self.registry.restricted_registry(names).collect()
        yield from self._fleet.collect()

    def render(self, kv: dict[str, KvTotals]) -> bytes:
        """The exposition text, with the engines' own totals of KV transfers."""
        self._fleet.kv = kv
        return generate_latest(self.registry)


class FleetCollector:
    """Gauges read from the live state when they are asked for."""

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self._fleet = fleet
        self._admission = admission
        self.kv: dict[str, KvTotals] = {}

    def collect(self) -> Iterator[Metric]:
        yield from self._engines()
        share = GaugeMetricFamily(
            "hexgen2:route_share", "The plan's share of each route", labels=("prefill", "target")
        )
        for path in self._fleet.planned.paths:
            share.add_metric((path.prefill or "", path.target), path.share)
        yield share
        yield GaugeMetricFamily("hexgen2:requests_queued", "Requests that wait", value=self._admission.waiting)
        yield GaugeMetricFamily(
            "hexgen2:tasks", "Tasks of the coordinator's event loop", value=len(asyncio.all_tasks())
        )
        yield from self._kv(self.kv.items())

    def _engines(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("hexgen2:engine_up", "1 where the engine takes requests", labels=_BY_GROUP)
        flight = GaugeMetricFamily("hexgen2:engine_in_flight", "Legs under way on the engine", labels=_BY_GROUP)
        placed = GaugeMetricFamily(
            "hexgen2:engine_load",
            "What is bound for the engine over what it is meant to run at once, or the part of its KV cache in "
            "use where that is more",
            labels=_BY_GROUP,
        )
        kv = GaugeMetricFamily(
            "hexgen2:engine_kv_used", "Part of the engine's KV blocks in use", labels=_BY_GROUP
        )
        gated = GaugeMetricFamily(
            "hexgen2:engine_second_legs_waiting",
            "Requests whose KV cache is ready and that wait for a slot of the engine",
            labels=_BY_GROUP,
        )
        broken = GaugeMetricFamily(
            "hexgen2:engine_breaker_open", "1 where the engine is left alone after failures", labels=_BY_GROUP
        )
        now = time.monotonic()
        for engine in self._fleet.engines.values():
            labels = (engine.id, engine.endpoint.role)
            up.add_metric(labels, float(engine.up))
            flight.add_metric(labels, engine.in_flight)
            placed.add_metric(labels, engine.load)
            kv.add_metric(labels, engine.kv_used)
            gated.add_metric(labels, engine.gate.waiting)
            broken.add_metric(labels, float(self._fleet.breakers[engine.id].state(now) == "open"))
        yield from (up, flight, placed, kv, gated, broken)

    def _kv(self, totals: Iterable[tuple[str, KvTotals]]) -> Iterator[Metric]:
        moved = CounterMetricFamily(
            "hexgen2:kv_transfer_bytes", "KV cache bytes received by the engine", labels=("group",)
        )
        seconds = CounterMetricFamily(
            "hexgen2:kv_transfer_seconds", "Time the engine's KV transfers took, summed", labels=("group",)
        )
        count = CounterMetricFamily("hexgen2:kv_transfers", "KV transfers completed", labels=("group",))
        failed = CounterMetricFamily("hexgen2:kv_transfers_failed", "KV transfers failed", labels=("group",))
        for group, total in totals:
            moved.add_metric((group,), total.bytes)
            seconds.add_metric((group,), total.seconds)
            count.add_metric((group,), total.transfers)
            failed.add_metric((group,), total.failed)
        yield from (moved, seconds, count, failed)
