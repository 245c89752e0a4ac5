"""Readings of the metrics, and what they say of the last seconds: rates, quantiles, shares, bounded memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hexgen2.coordinator.live.history import COARSE, FINE, History
from hexgen2.coordinator.live.reading import Reading, quantile, read


def test_a_reading_takes_the_figures_of_the_metrics() -> None:
    registry = CollectorRegistry()
    requests = Counter("hexgen2:requests", "", ("endpoint", "status"), registry=registry)
    requests.labels("/v1/completions", "200").inc(3)
    requests.labels("/v1/chat/completions", "200").inc(2)
    requests.labels("/v1/completions", "429").inc()
    requests.labels("/v1/completions", "503").inc()
    requests.labels("/v1/completions", "502").inc()
    Counter("hexgen2:output_tokens", "", registry=registry).inc(40)
    Counter("hexgen2:route_requests", "", ("prefill", "target"), registry=registry).labels("p0", "d0").inc(4)
    Gauge("hexgen2:engine_up", "", ("group", "role"), registry=registry).labels("d0", "decode").set(1)
    ttft = Histogram(
        "hexgen2:time_to_first_token_seconds", "", ("group",), buckets=(1.0, 2.0), registry=registry
    )
    ttft.labels("d0").observe(0.5)
    ttft.labels("d1").observe(1.5)
    Counter("unknown", "", registry=registry).inc()
    found = read(registry.collect(), 7.0)
    assert (found.at_s, found.answered, found.refused, found.errors, found.tokens) == (7.0, 5, 2, 1, 40)
    assert found.routes == {("p0", "d0"): 4}
    assert found.up == {"d0": True}
    assert found.ttft == {1.0: 1.0, 2.0: 2.0, math.inf: 2.0}
    assert found.capacity_rps is None


@given(
    st.lists(st.floats(0.01, 90), min_size=1, max_size=40),
    st.lists(st.floats(0.01, 90), max_size=20),
    st.floats(0.01, 0.99),
)
def test_a_quantile_lies_in_the_bucket_of_the_true_one(new: list[float], old: list[float], part: float) -> None:
    edges = (0.1, 1.0, 5.0, 25.0, 100.0, math.inf)

    def buckets(values: list[float]) -> dict[float, float]:
        return {edge: float(sum(value <= edge for value in values)) for edge in edges}

    found = quantile(buckets(old), buckets(old + new), part)
    true = sorted(new)[math.ceil(part * len(new)) - 1]
    low, high = max([0.0, *(e for e in edges if e < true)]), min(e for e in edges if e >= true)
    assert found is not None
    assert low - 1e-9 <= found <= high + 1e-9


def test_nothing_observed_has_no_quantile() -> None:
    same = {1.0: 4.0, math.inf: 4.0}
    assert quantile(same, same, 0.5) is None
    assert quantile({}, {}, 0.5) is None
    assert quantile({}, {1.0: 0.0, math.inf: 3.0}, 0.5) == 1.0, "the last finite edge"


def filled(seconds: int, rps: float = 3.0) -> History:
    """So many seconds of a service that answers, 2 of 3 requests along p0 → d0."""
    history = History()
    for second in range(seconds):
        done = rps * second
        routes = {("p0", "d0"): done * 2 / 3, ("p0", "d1"): done / 3}
        history.add(
            Reading(float(second), statuses={"200": done}, tokens=10 * done, routes=routes), 1e9 + second
        )
    return history


def test_rates_and_shares() -> None:
    history = filled(100)
    assert history.last is not None
    assert history.last.throughput_rps == pytest.approx(3.0)
    assert history.last.output_tokens_per_s == pytest.approx(30.0)
    assert history.shares() == pytest.approx({("p0", "d0"): 2 / 3, ("p0", "d1"): 1 / 3})
    assert sum(history.routed().values()) == pytest.approx(3.0)


def test_shares_wait_for_enough_requests() -> None:
    assert filled(2, rps=0.5).shares() == {}
    assert filled(1).routed() == {}
    assert filled(1).last is not None


def test_a_share_is_of_the_last_minute() -> None:
    history = filled(50)
    for second in range(50, 120):
        routes = {("p0", "d0"): 98.0, ("p0", "d1"): 49.0 + second}
        history.add(Reading(float(second), routes=routes), 1e9 + second)
    assert history.shares() == {("p0", "d1"): 1.0}


def test_memory_is_bounded_and_only_what_is_new_is_given() -> None:
    history = filled(5000)
    everything = history.columns(0)
    assert {len(values) for values in everything["fine"].values()} == {FINE}
    assert {len(values) for values in everything["coarse"].values()} == {COARSE}
    assert history.last is not None
    newer = history.columns(history.last.seq - 2)
    assert newer["fine"]["seq"] == [history.last.seq - 1, history.last.seq]
    assert len(history._readings) <= 62
