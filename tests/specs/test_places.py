"""How many requests an engine may have bound for it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.specs.places import PromptsAhead, places, prompts_at_most
from hexgen2.specs.routing import Path

seconds = st.floats(1e-6, 1e4)


@given(st.integers(1, 500))
def test_an_engine_has_a_place_for_each_that_it_may_run(max_batch: int) -> None:
    assert places(max_batch, 1.0) == max_batch <= places(max_batch)


def test_prefill_engines_share_their_prompts_out_by_routes() -> None:
    paths = [Path("p0", "d0", 0.25), Path("p0", "d1", 0.25), Path("p1", "d1", 0.3), Path(None, "c0", 0.2)]
    found = prompts_at_most(paths, {"p0": 20, "p1": 7, "d0": 4, "d1": 4, "c0": 9})
    assert found == {"d0": 10, "d1": 17}
    assert prompts_at_most([Path("p0", "d0", 0.0)], {"p0": 8, "d0": 8}) == {}


def learned(times: list[tuple[float, float]], most: int) -> PromptsAhead:
    ahead = PromptsAhead()
    ahead.most = most
    for prompt_s, answer_s in times:
        ahead.computed(prompt_s)
        ahead.answered(answer_s)
    return ahead


@given(st.lists(st.tuples(seconds, seconds), max_size=50), st.integers(0, 512), st.integers(1, 512))
def test_never_more_prompts_than_may_run_at_once(
    times: list[tuple[float, float]], most: int, batch: int
) -> None:
    number = learned(times, most).number(batch)
    assert 0 <= number <= most
    if times:
        slowest = max(prompt for prompt, _ in times) / min(answer for _, answer in times)
        assert number <= math.ceil(batch * slowest * (1 + 1e-9))


@pytest.mark.parametrize(
    ("prompt_s", "answer_s", "number"),
    [(0.01, 1.0, 1), (0.25, 1.0, 4), (2.0, 1.0, 32), (1000.0, 1.0, 64)],
)
def test_as_many_as_end_while_a_prompt_is_computed(prompt_s: float, answer_s: float, number: int) -> None:
    assert learned([(prompt_s, answer_s)] * 3, most=64).number(16) == number


def test_it_follows_the_load_and_forgets_single_requests() -> None:
    ahead = learned([(0.5, 1.0)] * 100, most=1000)
    ahead.computed(5.0)
    assert ahead.number(100) <= 75
    for _ in range(200):
        ahead.computed(5.0)
    assert ahead.number(100) >= 495
