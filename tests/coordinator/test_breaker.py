"""Engines that fail request after request are left alone, tried, and taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.coordinator import Limits
from hexgen2.coordinator.breaker import Breaker, BreakerSettings
from hexgen2.emulator import Fault

from .conftest import running

SETTINGS = BreakerSettings(failures=3, open_s=1.0, max_open_s=4.0)


def opened(at: float) -> Breaker:
    breaker = Breaker(SETTINGS)
    assert [breaker.failed(at) for _ in range(3)] == [False, False, True]
    return breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(SETTINGS)
    for _ in range(10):
        breaker.failed(0.0)
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.state(0.0) == "closed"
    assert opened(0.0).state(0.5) == "open"


def test_one_trial_decides() -> None:
    breaker = opened(0.0)
    assert not breaker.allows(0.9)
    assert breaker.allows(1.0)
    breaker.sent(1.0)
    assert breaker.state(1.0) == "half_open"
    assert not breaker.allows(1.0)
    breaker.succeeded()
    assert breaker.allows(1.0)
    assert breaker.state(1.0) == "closed"


def test_each_failed_trial_doubles_the_pause_up_to_a_bound() -> None:
    breaker, now, pauses = opened(0.0), 0.0, []
    for _ in range(5):
        wait = next(step / 10 for step in range(1, 1000) if breaker.allows(now + step / 10))
        pauses.append(wait)
        now += wait
        breaker.sent(now)
        assert breaker.failed(now)
    assert pauses == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_trial_without_an_outcome_does_not_block_for_ever() -> None:
    breaker = opened(0.0)
    breaker.sent(1.0)
    assert not breaker.allows(1.5)
    assert breaker.allows(2.0)


def test_late_failures_of_earlier_requests_do_not_count() -> None:
    breaker = opened(0.0)
    assert not any(breaker.failed(0.5) for _ in range(10))
    assert breaker.allows(1.0)


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from(["sent", "failed", "succeeded"])), max_size=60))
def test_it_always_opens_up_again_within_its_bound(steps: list[tuple[float, str]]) -> None:
    breaker, now = Breaker(SETTINGS), 0.0
    for wait, what in steps:
        now += wait
        if what == "succeeded":
            breaker.succeeded()
        else:
            getattr(breaker, what)(now)
    assert breaker.allows(now + 2 * SETTINGS.max_open_s)


async def test_an_engine_that_fails_everything_is_left_alone_and_taken_back() -> None:
    limits = Limits(breaker_failures=3, breaker_open_s=600, breaker_max_open_s=600)
    async with running({"c0": 0.5, "c1": 0.5}, limits=limits) as stand:
        stand.engines["c0"].fault = Fault("http_500")
        for _ in range(20):
            await stand.complete("a", max_tokens=1)
        assert len(stand.received("c0")) == 3
        assert await stand.metric("hexgen2:engine_breaker_open", group="c0") == 1
        async with stand.http.get(stand.url + "/health") as response:
            assert (await response.json())["engines"]["c0"]["breaker"] == "open"
        stand.engines["c0"].fault = None
        stand.coordinator.fleet.breakers["c0"]._open_until = 0.0  # as if the pause were over
        for _ in range(20):
            await stand.complete("a", max_tokens=1)
        assert len(stand.received("c0")) >= 3 + 8


async def test_breakers_never_refuse_the_last_path() -> None:
    limits = Limits(breaker_failures=1, breaker_open_s=600, breaker_max_open_s=600, max_retries=0)
    async with running({"c0": 1.0}, limits=limits) as stand:
        stand.engines["c0"].fault = Fault("http_500", times=1)
        assert (await stand.post("/v1/completions", {"prompt": "a"}))[0] == 502
        assert (await stand.post("/v1/completions", {"prompt": "a"}))[0] == 200


async def test_a_prefill_engine_s_fault_does_not_break_the_decode_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """p0's KV caches cannot be fetched: the routes from p0 are avoided, those from p1 to the same engine
    are not.
    """
    limits = Limits(breaker_failures=2, breaker_open_s=600, breaker_max_open_s=600, max_retries=3)
    async with running({"p0>d0": 0.5, "p1>d0": 0.5}, limits=limits) as stand:
        bad = stand.engines["p0"]
        offer = bad.kv_store.offer
        monkeypatch.setattr(bad.kv_store, "pull", lambda _: None)
        monkeypatch.setattr(bad.kv_store, "offer", lambda *a: offer(*a) | {"remote_port": 9})
        for _ in range(12):
            await stand.complete("a b", max_tokens=2)
        assert await stand.metric("hexgen2:engine_failures_total", group="d0", kind="http_5xx") == 2
        assert await stand.metric("hexgen2:engine_breaker_open", group="d0") == 0
