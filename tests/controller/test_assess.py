"""The remedies on real little plans: what each costs, what each brings, and that the running groups stay."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from hexgen2.controller.assess import Assessment, Flipping, Task, assess
from hexgen2.controller.carry import Carrier, seats_of, shares_of
from hexgen2.controller.plans import plan_of
from hexgen2.controller.remedies import Demand
from hexgen2.controller.replan import Effort, plans, reduced, trimmed
from hexgen2.specs.workload import Lengths
from tests.controller.cases import any_role, long_answers, long_prompts, nodes, plan, setting

EFFORT = Effort(warm_s=1.0, fresh_s=0.5)
ENDLESS = Demand(math.inf, horizon_s=1800, restart_s=60)
ALL = frozenset(gpu.id for gpu in nodes().gpus)
NO_FLIP = Flipping()


def task(of: Lengths, **more: Any) -> Task:
    seats = seats_of(plan())
    values: dict[str, Any] = {
        "setting": setting(of),
        "seats": seats,
        "shares": shares_of(plan()),
        "up": frozenset(seat.id for seat in seats),
        "usable": ALL,
        "demand": ENDLESS,
        "effort": EFFORT,
    }
    return Task(**(values | more))


@pytest.fixture(scope="module")
def turned() -> Assessment:
    """The plan for long prompts under long answers; engines that take any role."""
    return assess(task(long_answers(), flipping=any_role(plan())), _Ticks())


def test_remedies_rise_in_cost_and_in_rate(turned: Assessment) -> None:
    found = turned.candidates
    assert [one.cost for one in found] == sorted(one.cost for one in found)
    assert [one.rps for one in found] == sorted(one.rps for one in found)
    assert turned.best_rps == pytest.approx(found[-1].rps)
    assert turned.now_rps <= found[0].rps * (1 + 1e-9)
    assert "flip" in {one.remedy for one in found}


def test_the_best_is_near_the_planners_own_plan(turned: Assessment) -> None:
    assert turned.best_rps >= 0.95 * plan("answers", solver="hexgen2").throughput_rps


def test_flips_start_nothing(turned: Assessment) -> None:
    for one in turned.candidates:
        if one.remedy == "flip":
            assert one.flips
            assert not one.starts
            assert not one.waves
            assert {seat.id for seat in one.seats} == {seat.id for seat in seats_of(plan())}


@pytest.fixture(scope="module")
def rigid() -> Assessment:
    """The same with engines that keep their roles."""
    return assess(task(long_answers()), _Ticks())


def test_a_replan_keeps_groups_and_never_reuses_a_name(rigid: Assessment) -> None:
    old = {seat.id: seat for seat in seats_of(plan())}
    assert "replan" in {one.remedy for one in rigid.candidates}
    for one in rigid.candidates:
        if one.remedy != "replan":
            continue
        used: set[str] = set()
        for seat in one.seats:
            assert not seat.gpus & used
            used |= seat.gpus
            if seat.id in old:
                assert seat.stages == old[seat.id].stages
        assert set(one.starts).isdisjoint(old)
        plan_of(plan(), one.seats, one.carried, long_answers(), "a test")  # it is a valid plan


def test_engines_that_cannot_change_their_role_are_not_asked_to(rigid: Assessment) -> None:
    assert all(not one.flips for one in rigid.candidates)


def test_without_search_nothing_is_started() -> None:
    found = assess(task(long_answers(), flipping=any_role(plan()), search=False))
    assert {one.remedy for one in found.candidates} <= {"routes", "flip"}


def test_a_lost_node_is_not_planned_with() -> None:
    gone = "n0"
    seats = seats_of(plan())
    up = frozenset(seat.id for seat in seats if not any(gpu.startswith(gone) for gpu in seat.gpus))
    usable = frozenset(gpu for gpu in ALL if not gpu.startswith(gone))
    found = assess(task(long_prompts(), up=up, usable=usable, flipping=any_role(plan())), _Ticks())
    assert found.now_rps < plan().throughput_rps
    for one in found.candidates:
        assert all(seat.gpus <= usable for seat in one.seats)
    assert found.candidates[-1].rps > found.now_rps


def test_flips_stop_where_the_demand_is_met() -> None:
    now = assess(task(long_answers(), search=False)).candidates[0].rps
    little = Demand(now * 1.01, 1800, 60)
    found = assess(task(long_answers(), flipping=any_role(plan()), demand=little, search=False))
    assert sum(one.remedy == "flip" for one in found.candidates) == 1


def test_a_task_travels_to_another_process() -> None:
    asked = task(long_answers(), flipping=any_role(plan()), search=False)
    sent = pickle.loads(pickle.dumps(asked))
    assert assess(sent).candidates == assess(asked).candidates
    assert pickle.loads(pickle.dumps(assess(asked).candidates)) == assess(asked).candidates


def test_searching_from_the_best_plan_changes_nothing() -> None:
    best = plan("answers", solver="hexgen2")
    seats = seats_of(best)
    ways = list(plans(setting(long_answers()), seats, ALL, NO_FLIP, _Ticks(), EFFORT))
    carrier = Carrier(setting(long_answers()))
    for way in ways:
        assert carrier.best(way).rps <= best.throughput_rps * 1.01
    least = 0.01 * best.throughput_rps
    assert all({s.id for s in trimmed(carrier, seats, way, least)} == {s.id for s in seats} for way in ways)


def test_a_change_that_adds_too_little_is_undone() -> None:
    carrier = Carrier(setting(long_answers()))
    seats = seats_of(plan())
    way = list(plans(setting(long_answers()), seats, ALL, NO_FLIP, _Ticks(), EFFORT))[-1]
    added = carrier.best(way).rps - carrier.best(seats).rps
    assert {s.id for s in trimmed(carrier, seats, way, 0.0)} - {s.id for s in seats}
    assert trimmed(carrier, seats, way, added + 1) == seats or {
        s.id for s in trimmed(carrier, seats, way, added + 1)
    } == {s.id for s in seats}


def test_a_smaller_cluster_has_the_usable_gpus_alone() -> None:
    small = reduced(nodes(), {"n0/1", "n2/0", "n2/1"})
    assert small is not None
    assert [(node.name, node.count) for node in small.nodes] == [("n0", 1), ("n2", 2)]
    assert reduced(nodes(), ()) is None


@pytest.mark.parametrize(
    ("rps", "during", "after", "expected"),
    [
        (10.0, (), 5.0, 500.0),
        (10.0, (), 50.0, 1000.0),
        (10.0, (0.0,), 50.0, 800.0),
        (10.0, (4.0, 2.0), 10.0, 80.0 + 40.0 + 600.0),
        (math.inf, (0.0,) * 9, 50.0, 0.0),  # longer than the horizon: nothing is gained within it
    ],
)
def test_requests_over_the_horizon(
    rps: float, during: tuple[float, ...], after: float, expected: float
) -> None:
    assert Demand(rps, horizon_s=100, restart_s=20).served(after, during) == pytest.approx(expected)


class _Ticks:
    """A clock on which every look takes a millisecond: searches end the same way on every machine."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        self._now += 1e-3
        return self._now
