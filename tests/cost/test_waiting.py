"""Waiting against closed forms: Pollaczek–Khinchine, Erlang's C, and the busy period."""

from __future__ import annotations

from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.cost.queueing import BatchServer, attained, full_probability, stretched_exceeds

LOADS = [0.1, 0.5, 0.9]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("square", [1.0, 2.0, 4.5], ids=["M/D/1", "M/M/1", "M/G/1"])
def test_mean_wait_of_a_single_server(square: float, load: float) -> None:
    """A prompt waits for the rest of the round and for the work that came before it in that round."""
    rounds = BatchServer(0.0, 1.0, square).rounds(load)
    assert rounds is not None
    assert rounds.busy == pytest.approx(load)  # a single server works as much as comes
    wait = rounds.busy * rounds.seen / 2 * (1 + load)
    assert wait == pytest.approx(load * square / (2 * (1 - load)))  # Pollaczek–Khinchine


def test_no_end_to_the_wait_at_full_load() -> None:
    assert BatchServer(0.1, 1.0, 1.0).rounds(1.0) is None


def test_fixed_time_alone_makes_rounds_of_that_time() -> None:
    """Requests that cost nothing beside a fixed time of 1 s: a server under load goes round once a second."""
    rounds = BatchServer(1.0, 1e-9, 1e-18).rounds(50.0)
    assert rounds is not None
    assert (rounds.mean, rounds.square, rounds.busy) == pytest.approx((1.0, 1.0, 1.0))


def test_decoding_goes_on_without_prompts() -> None:
    """Rounds of 30 ms without prompts, and hardly any prompts: such rounds and no others."""
    rounds = BatchServer(0.02, 0.2, 0.05, idle_s=0.03).rounds(1e-6)
    assert rounds is not None
    assert rounds.mean == pytest.approx(0.03, rel=1e-4)
    assert rounds.busy == 1.0
    assert rounds.empty == pytest.approx(1, abs=1e-3)


@given(st.floats(0.01, 0.9), st.floats(0, 2), st.floats(1, 5), st.integers(1, 6))
def test_rounds_grow_with_load_and_stages(load: float, fixed: float, square: float, stages: int) -> None:
    server = BatchServer(fixed, 1.0, square, stages=stages, full_s=50.0)
    less, more = server.rounds(load * 0.9), server.rounds(load)
    assert less is not None
    assert more is not None
    # Near a full batch the approximation is not monotone to the last per cent: 0.968 was found.
    assert more.mean >= less.mean * 0.95
    assert more.square >= more.mean**2 * (1 - 1e-9)
    single = BatchServer(fixed, 1.0, square).rounds(load)
    assert single is not None
    assert more.mean >= single.mean * (1 - 2e-2)


def erlang_c(load: float, places: int) -> float:
    """Probability of a wait with exponential (or any, in processor sharing) service, from the textbook."""
    full = load**places / factorial(places) / (1 - load / places)
    return full / (sum(load**n / factorial(n) for n in range(places)) + full)


@pytest.mark.parametrize(("load", "places"), [(0.5, 1), (0.9, 1), (3.0, 4), (8.0, 10), (60.0, 64)])
def test_places_of_equal_speed(load: float, places: int) -> None:
    seconds = np.full(places, 2.0)
    assert full_probability(load / 2, seconds) == pytest.approx(erlang_c(load, places))


def test_places_that_cannot_keep_up() -> None:
    assert full_probability(2.0, np.full(4, 2.0)) == 1.0


@given(st.floats(0.1, 1.5), st.integers(2, 200))
def test_slower_steps_fill_more_places(load: float, places: int) -> None:
    seconds = np.linspace(1, 2, places)
    rate = load * places / 4
    assert full_probability(rate, seconds) <= full_probability(rate, seconds * 1.1) + 1e-12


class TestStretched:
    def test_without_interruptions(self) -> None:
        assert stretched_exceeds(1.0, 0.0, 1.0, 1.0, 1.1) == 0.0
        assert stretched_exceeds(1.2, 0.0, 1.0, 1.0, 1.1) == 1.0

    def test_no_end_at_full_load(self) -> None:
        assert stretched_exceeds(0.1, 2.0, 0.5, 0.25, 100.0) == 1.0

    @pytest.mark.parametrize("load", [0.2, 0.6])
    def test_mean_is_that_of_the_delay_busy_period(self, load: float) -> None:
        """Work of 50 s: E[L] = ∫ P(L > x) dx = 50 / (1 − ρ)."""
        xs = np.linspace(0, 2000, 40_001)
        tails = [stretched_exceeds(50.0, load, 1.0, 2.0, float(x)) if x > 0 else 1.0 for x in xs]
        assert np.trapezoid(tails, xs) == pytest.approx(50 / (1 - load), rel=0.01)

    @given(st.floats(0.1, 50), st.floats(0.01, 0.95), st.floats(1, 5), st.floats(0.1, 500))
    def test_falls_with_the_limit(self, work: float, load: float, square: float, limit: float) -> None:
        near = stretched_exceeds(work, load, 1.0, square, limit)
        far = stretched_exceeds(work, load, 1.0, square, limit * 1.5)
        assert 0 <= far <= near + 1e-9 <= 1 + 2e-9

    def test_against_a_simulation(self) -> None:
        """Work of 5 s, interruptions of exponential length: the law is an approximation to a few per cent."""
        rng = np.random.default_rng(1)
        lengths = []
        for _ in range(4000):
            end, at = 5.0, rng.exponential(1 / 0.5)
            while at < end:
                end += rng.exponential(1.0)
                at += rng.exponential(1 / 0.5)
            lengths.append(end)
        for limit in (8.0, 12.0, 20.0):
            expected = float(np.mean(np.array(lengths) > limit))
            assert stretched_exceeds(5.0, 0.5, 1.0, 2.0, limit) == pytest.approx(expected, abs=0.04)


def test_attained() -> None:
    slack = np.array([-1.0, 0.0, 1.0, 1e9])
    assert attained(slack, 0.0, 1.0, 1.0) == 0.75  # nobody waits: who is late is late by itself
    assert attained(slack, 1.0, 1.0, 1.0) == pytest.approx((0 + 0 + (1 - np.exp(-1)) + 1) / 4)
    assert attained(slack, 1.0, 1.0, 0.0) == pytest.approx(0.25, abs=0.26)  # the wait is 1 s exactly
