from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.controller.carry import Carrier, live, seats_of, shares_of
from hexgen2.controller.plans import plan_of
from hexgen2.specs.plan import ROLES
from tests.controller.cases import long_answers, long_prompts, plan, setting


def test_a_plan_carries_what_the_scheduler_says() -> None:
    carrier = Carrier(setting(long_prompts()))
    seats = seats_of(plan())
    assert carrier.best(seats).rps == pytest.approx(plan().throughput_rps)
    assert carrier.with_shares(seats, shares_of(plan())) == pytest.approx(plan().throughput_rps, rel=1e-6)


def test_another_load_carries_otherwise() -> None:
    carrier = Carrier(setting(long_answers()))
    seats = seats_of(plan())
    now = carrier.with_shares(seats, shares_of(plan()))
    assert now <= carrier.best(seats).rps * (1 + 1e-9)
    assert carrier.best(seats).rps < plan("answers").throughput_rps


@given(st.data())
def test_fewer_groups_never_carry_more(data: st.DataObject) -> None:
    carrier = Carrier(setting(long_prompts()))
    seats = seats_of(plan())
    up = data.draw(st.sets(st.sampled_from([seat.id for seat in seats])))
    left = live(seats, up)
    assert carrier.best(left).rps <= carrier.best(seats).rps * (1 + 1e-9)
    assert carrier.with_shares(left, shares_of(plan())) <= carrier.best(left).rps * (1 + 1e-6)


@given(st.data())
def test_routes_stay_within_groups_and_shares_sum_to_one(data: st.DataObject) -> None:
    carrier = Carrier(setting(data.draw(st.sampled_from([long_prompts(), long_answers()]))))
    roles = st.sampled_from(ROLES)
    seats = tuple(seat.as_role(data.draw(roles)) for seat in seats_of(plan()))
    found = carrier.best(seats)
    for seat in seats:
        flow = sum(rps for pair, rps in found.routes.items() if seat.id in pair)
        assert flow <= carrier.worth(seat).rps * (1 + 1e-6)
    if found.rps > 0:
        assert sum(found.shares.values()) == pytest.approx(1.0)
        assert carrier.with_shares(seats, found.shares) == pytest.approx(found.rps, rel=1e-5)
        made = plan_of(plan(), seats, found, long_prompts(), "a test")
        assert made.throughput_rps == found.rps


def test_an_engine_keeps_the_batch_it_was_started_for() -> None:
    carrier = Carrier(setting(long_answers()))
    seat = replace(seats_of(plan())[0].as_role("decode"), started_batch=None)
    few = replace(seat, started_batch=2)
    assert carrier.worth(few).batch == 2
    assert carrier.worth(few).rps < carrier.worth(seat).rps


def test_a_slow_link_counts_and_a_fast_one_changes_nothing() -> None:
    seats = seats_of(plan())
    planned = Carrier(setting(long_prompts())).best(seats)
    targets = {target for _, target in planned.routes}
    slow = Carrier(setting(long_prompts(), links=dict.fromkeys(targets, 1e6))).best(seats)
    fast = Carrier(setting(long_prompts(), links=dict.fromkeys(targets, 1e15))).best(seats)
    assert slow.rps < 0.1 * planned.rps
    assert fast.rps == pytest.approx(planned.rps)


def test_lost_groups_stay_in_the_plan_without_a_share() -> None:
    seats = seats_of(plan())
    lost = next(seat for seat in seats if seat.role == "prefill")
    carried = Carrier(setting(long_prompts())).best(tuple(seat for seat in seats if seat is not lost))
    made = plan_of(plan(), seats, carried, long_prompts(), "a test")
    assert made.group_by_id[lost.id].share == 0
    assert not [route for route in made.routes if lost.id in (route.source, route.target)]


def test_there_is_no_plan_of_nothing() -> None:
    carried = Carrier(setting(long_prompts())).best(())
    with pytest.raises(ValueError, match="serve nothing"):
        plan_of(plan(), (), carried, long_prompts(), "a test")
