"""The exhaustive solver under a time limit; what it finds without one is the yardstick of other tests."""

from __future__ import annotations

import itertools

import pytest

from hexgen2.scheduler import Problem, schedule
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan
from tests.scheduler.checks import check_plan
from tests.scheduler.support import A100, H100, cluster, problem


def asked() -> Problem:
    return problem(cluster((H100, 2), (A100, 2), gbps=10))


def ticks_of(limit: float | None) -> tuple[Plan, int]:
    """The plan when each look at the clock finds it a second later, and how often it was looked at."""
    clock = itertools.count()
    plan = schedule(asked(), solver="exhaustive", time_limit_s=limit, clock=lambda: float(next(clock)))
    return plan, next(clock)


def test_a_time_limit_ends_the_search_with_the_best_so_far() -> None:
    whole, looks = ticks_of(1e9)
    assert whole.objective == schedule(asked(), solver="exhaustive").objective
    assert whole.upper_bound == pytest.approx(whole.objective.value)
    assert not [note for note in whole.notes if "--time-limit" in note]
    values: list[float] = []
    for part in (0.1, 0.4, 0.6, 0.9):
        plan, taken = ticks_of(part * looks)
        assert taken <= (1.1 * part + 0.02) * looks, "a tenth more at most, and a few looks"
        check_plan(plan, asked().model, asked().lengths)
        assert plan.upper_bound is not None
        assert plan.upper_bound >= whole.objective.value * (1 - 1e-9)
        assert any("--time-limit" in note for note in plan.notes)
        values.append(plan.objective.value)
    assert values[0] < whole.objective.value * (1 - 1e-6), "cut off before the best was seen"
    assert max(values) <= whole.objective.value * (1 + 1e-9)


def test_a_limit_that_ends_before_any_plan_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match=r"--time-limit: 1 s .*; .*--solver hexgen2"):
        ticks_of(1)
