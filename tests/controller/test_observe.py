from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.controller.observe import (
    MOST_RECORDS,
    Finished,
    FleetState,
    KvReceived,
    Spread,
    Window,
    kv_bandwidth,
)

IDLE = FleetState({"p0": 0.0})


def window(*requests: tuple[float, int, int], span_s: float = 10.0, at_least: int = 1) -> Window:
    made = Window(span_s, began_s=0.0, at_least=at_least)
    for at_s, tokens_in, tokens_out in requests:
        made.arrived(at_s)
        made.finished(Finished(at_s, tokens_in, tokens_out))
    return made


def test_rates_are_those_of_the_window() -> None:
    made = window(*((t / 2, 100, 10) for t in range(60)))
    seen = made.observe(30.0, IDLE)
    assert seen.arrival_rps == pytest.approx(2.0)
    assert seen.completed_rps == pytest.approx(2.0)
    assert seen.span_s == 10.0


def test_a_young_window_counts_since_it_began() -> None:
    made = window(*((t / 2, 100, 10) for t in range(8)))
    assert made.observe(4.0, IDLE).arrival_rps == pytest.approx(2.0)


def test_what_came_but_was_not_answered_counts_as_arrival() -> None:
    made = window((1.0, 5, 5))
    made.arrived(2.0)
    seen = made.observe(10.0, IDLE)
    assert (seen.arrival_rps, seen.completed_rps) == (pytest.approx(0.2), pytest.approx(0.1))


def test_old_requests_are_forgotten() -> None:
    made = window((1.0, 1000, 1), *((20.0 + t, 10, 2) for t in range(10)))
    seen = made.observe(30.0, IDLE)
    assert seen.inputs is not None
    assert seen.inputs.mean == 10


def test_lengths_reach_further_back_where_few_requests_are_answered() -> None:
    made = window((1.0, 100, 10), (12.0, 300, 10), (14.0, 300, 10), (19.0, 300, 10), at_least=3)
    seen = made.observe(24.0, IDLE)
    assert seen.completed_rps == pytest.approx(0.2)  # two in ten seconds
    assert seen.inputs is not None
    assert (seen.requests, seen.inputs.mean) == (3, 300)
    assert made.observe(80.0, IDLE).lengths is None  # but not for ever


def test_too_few_requests_tell_no_lengths() -> None:
    seen = window((1.0, 100, 10), at_least=2).observe(5.0, IDLE)
    assert seen.lengths is None
    assert seen.inputs is None
    assert not seen.steady


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 5_000)), min_size=1, max_size=200),
)
def test_the_representative_requests_are_among_those_seen(pairs: list[tuple[int, int]]) -> None:
    made = window(*((float(t) / 100, *pair) for t, pair in enumerate(pairs)))
    seen = made.observe(5.0, IDLE)
    assert seen.lengths is not None
    assert set(zip(seen.lengths.inputs, seen.lengths.outputs, strict=True)) <= set(pairs)
    assert seen.inputs is not None
    assert seen.inputs.p10 <= seen.inputs.p50 <= seen.inputs.p90 <= seen.inputs.p99


@pytest.mark.parametrize(
    ("after", "steady"),
    [((1000, 50), True), ((300, 50), False), ((1000, 400), False), ((1050, 52), True)],
)
def test_a_turning_load_is_not_steady(after: tuple[int, int], steady: bool) -> None:
    rng = np.random.default_rng(0)
    requests = [(t / 20, 1000, 50) for t in range(100)] + [(5 + t / 20, *after) for t in range(100)]
    jittered = [(t, max(1, round(i * rng.uniform(0.9, 1.1))), o) for t, i, o in requests]
    assert window(*jittered).observe(10.0, IDLE).steady is steady


def test_a_full_record_spans_less_time() -> None:
    made = window(*((t / 10_000, 5, 5) for t in range(2 * MOST_RECORDS)))
    assert made.observe(2 * MOST_RECORDS / 10_000, IDLE).arrival_rps == pytest.approx(10_000, rel=1e-3)


def test_bandwidth_counts_what_others_took_at_the_same_time() -> None:
    # A link of 100 B/s carries 60 B/s; a transfer then gets 40 B/s in the mean (M/G/1-PS).
    assert kv_bandwidth(KvReceived(600.0, 10, 600 / 40), 10.0) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (KvReceived(0, 0, 0), KvReceived(600, 6, 2), 360.0),
        (KvReceived(100, 1, 1), KvReceived(700, 7, 3), 360.0),
        (KvReceived(9000, 90, 90), KvReceived(600, 6, 2), 360.0),  # started again: it counts from zero
        (KvReceived(600, 6, 2), KvReceived(600, 6, 2), None),
    ],
)
def test_links_come_from_what_counters_grew_by(
    first: KvReceived, last: KvReceived, expected: float | None
) -> None:
    made = Window(60.0, 0.0)
    made.received(0.0, {"d0": first})
    made.received(10.0, {"d0": last})
    assert made.observe(10.0, IDLE).links.get("d0") == (None if expected is None else pytest.approx(expected))


def test_forgetting_begins_anew() -> None:
    made = window((1.0, 5, 5))
    made.forget(4.0)
    seen = made.observe(6.0, IDLE)
    assert (seen.requests, seen.span_s) == (0, 2.0)


@pytest.mark.parametrize(
    ("busy", "queued", "saturated"), [(0.2, 0, False), (0.95, 0, True), (0.2, 1, True), (0.89, 0, False)]
)
def test_saturation_shows_in_the_queue_or_the_places(busy: float, queued: int, saturated: bool) -> None:
    seen = Window(1.0, 0.0).observe(1.0, FleetState({}, busy=busy, queued=queued))
    assert seen.saturated is saturated


def test_no_spread_of_nothing() -> None:
    with pytest.raises(ValueError, match="no requests"):
        Spread.of(np.array([], dtype=np.int64))
