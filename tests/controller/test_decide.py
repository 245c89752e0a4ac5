"""Decision tables: when which remedy is taken, and what keeps it from being taken."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.controller.assess import Assessment
from hexgen2.controller.carry import Carried, Seat
from hexgen2.controller.decide import Decision, Memory, Policy, changed, decide, judge, needs_look
from hexgen2.controller.observe import FleetState, Observation
from hexgen2.controller.remedies import Candidate, Demand, Remedy
from hexgen2.controller.rollout import Wave
from tests.controller.cases import observation, plan

POLICY = Policy(confirm=2, cooldown_s=100.0, settle_s=50.0)
UP = frozenset({"p0", "d0"})
ROUTED = Memory(routed=UP)


def offer(remedy: Remedy, rps: float, served: float | None = None) -> Candidate:
    """A candidate of that rate; groups are what its remedy makes them."""
    new: tuple[Seat, ...] = (
        Seat("p0", "decode" if remedy == "flip" else "prefill", ()),
        Seat("d0", "decode", ()),
    )
    starts: tuple[str, ...] = ()
    if remedy == "replan":
        new, starts = (*new, Seat("d1", "decode", ())), ("d1",)
    return Candidate(
        remedy=remedy,
        seats=new,
        carried=Carried(rps, {("p0", "d0"): rps}, {}, {}, {}, ()),
        waves=tuple(Wave((), (), (), rps) for _ in starts),
        flips=("p0",) if remedy == "flip" else (),
        starts=starts,
        stops=(),
        served=rps * 1800 if served is None else served,
    )


def found(now: float, *offers: Candidate, rps: float = math.inf) -> Assessment:
    best = max((one.rps for one in offers), default=now)
    return Assessment(now, best, Demand(rps, 1800.0, 120.0), offers, 0.1)


def seen(**more: Any) -> Observation:
    return observation(up=UP, **more)


def act(found: Assessment, memory: Memory = ROUTED, times: int = 2, **more: Any) -> Decision:
    """The decision after so many observations of the same."""
    decision = None
    for _ in range(times):
        decision, memory = decide(POLICY, memory, seen(**more), found)
    assert decision is not None
    return decision


@pytest.mark.parametrize(
    ("offers", "action"),
    [
        ((), "keep"),
        ([("routes", 10.0)], "keep"),  # nothing gained
        ([("routes", 10.1)], "keep"),  # too little
        ([("routes", 10.3)], "routes"),
        ([("routes", 10.0), ("flip", 10.3)], "keep"),  # flips must gain more than routes
        ([("routes", 10.0), ("flip", 12.0)], "flip"),
        ([("routes", 11.6), ("flip", 12.0)], "routes"),  # the cheapest that nearly reaches the best
        ([("routes", 10.3), ("flip", 12.0)], "flip"),
        ([("routes", 10.0), ("flip", 19.5), ("replan", 20.0)], "flip"),
        ([("routes", 10.0), ("flip", 15.0), ("replan", 20.0)], "replan"),
        ([("routes", 10.0), ("replan", 10.4)], "keep"),
    ],
)
def test_the_cheapest_sufficient_remedy_is_taken(offers: list[tuple[Remedy, float]], action: str) -> None:
    assert act(found(10.0, *(offer(*one) for one in offers))).action == action


def test_a_restart_that_costs_more_than_it_brings_is_not_worth_it() -> None:
    dear = offer("replan", 20.0, served=10.2 * 1800)
    assert act(found(10.0, offer("routes", 10.0), dear)).action == "keep"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"steady": False}, "still changing"),
        ({"times": 1}, "seen 1 of 2"),
        ({"memory": replace(ROUTED, changed_s=950.0)}, "must pass"),
    ],
)
def test_what_makes_it_wait(more: dict[str, Any], why: str) -> None:
    decision = act(found(10.0, offer("flip", 20.0)), **more)
    assert decision.action == "keep"
    assert why in decision.text


def test_new_routes_need_no_steady_load() -> None:
    assert act(found(10.0, offer("routes", 20.0)), steady=False).action == "routes"


def test_a_remedy_must_be_asked_for_in_a_row() -> None:
    _, memory = decide(POLICY, ROUTED, seen(), found(10.0, offer("flip", 20.0)))
    _, memory = decide(POLICY, memory, seen(), found(10.0, offer("routes", 10.0)))
    decision, _ = decide(POLICY, memory, seen(), found(10.0, offer("flip", 20.0)))
    assert decision.action == "keep"


@pytest.mark.parametrize(
    ("offers", "action"),
    [
        ([("routes", 5.0)], "routes"),
        ([("routes", 5.0), ("flip", 9.0)], "flip"),
        ([("routes", 0.0), ("flip", 9.0)], "flip"),
    ],
)
def test_a_loss_is_answered_at_once(offers: list[tuple[Remedy, float]], action: str) -> None:
    memory = Memory(routed=UP | {"d1"}, changed_s=999.0)
    decision = act(found(5.0, *(offer(*one) for one in offers)), memory, times=1, steady=False)
    assert decision.action == action
    assert "came or went" in decision.text


def test_where_nothing_can_serve_nothing_is_done() -> None:
    nothing = found(0.0, offer("routes", 0.0))
    assert act(nothing, Memory(routed=UP | {"d1"}), times=1).action == "keep"


def test_a_group_that_comes_back_is_used_again_though_nothing_lacks() -> None:
    decision = act(found(50.0, offer("routes", 60.0), rps=5.0), Memory(routed=frozenset({"p0"})), times=1)
    assert decision.action == "routes"


@pytest.mark.parametrize(
    ("now", "arrivals", "waiting", "looks"),
    [(10.0, 8.0, 0, False), (10.0, 9.5, 0, True), (10.0, 1.0, 3, True), (10.0, 0.0, 0, False)],
)
def test_remedies_are_worked_out_only_where_something_lacks(
    now: float, arrivals: float, waiting: int, looks: bool
) -> None:
    fleet = FleetState(dict.fromkeys(UP, 0.0), queued=waiting)
    assert (needs_look(POLICY, ROUTED, seen(arrival_rps=arrivals, fleet=fleet), now) is not None) is looks


def after_change(remedy: Remedy = "flip", before_rps: float = 10.0) -> Memory:
    chosen = offer(remedy, 20.0)
    return changed(ROUTED, seen(completed_rps=before_rps), plan(), chosen, UP, now_s=1000.0)


@pytest.mark.parametrize(
    ("at_s", "completed", "busy", "action"),
    [
        (1040.0, 1.0, 1.0, None),  # not settled yet
        (1060.0, 15.0, 1.0, None),
        (1060.0, 9.6, 1.0, None),  # within the tolerance
        (1060.0, 9.0, 1.0, "roll_back"),
        (1060.0, 1.0, 0.1, None),  # fewer are asked for
    ],
)
def test_a_change_that_does_worse_is_taken_back(
    at_s: float, completed: float, busy: float, action: str | None
) -> None:
    now = seen(at_s=at_s, completed_rps=completed, fleet=FleetState(dict.fromkeys(UP, 0.0), busy=busy))
    decision, _ = judge(POLICY, after_change(), now)
    assert (None if decision is None else decision.action) == action
    if decision is not None:
        assert decision.plan is plan()


def test_what_was_taken_back_is_not_tried_again_soon() -> None:
    worse = seen(at_s=1060.0, completed_rps=1.0)
    _, memory = judge(POLICY, after_change(), worse)
    again = found(10.0, offer("routes", 10.0), offer("flip", 20.0))
    assert act(again, replace(memory, routed=UP), at_s=2000.0).action == "keep"
    assert act(again, replace(memory, routed=UP), at_s=1100.0 + POLICY.refuse_s).action == "flip"


def test_while_one_change_is_on_trial_no_other_is_made() -> None:
    decision = act(found(10.0, offer("replan", 20.0)), after_change(), at_s=1200.0)
    assert "on trial" in decision.text


def test_new_routes_and_the_answer_to_a_loss_are_on_no_trial() -> None:
    assert after_change("routes").trial is None
    lost = changed(Memory(routed=UP | {"d9"}), seen(), plan(), offer("flip", 5.0), UP, 1000.0)
    assert lost.trial is None
    assert lost.routed == UP


rates = st.floats(0.1, 100)


@given(
    rates, st.lists(st.tuples(st.sampled_from(["routes", "flip", "replan"]), rates), max_size=6), st.booleans()
)
def test_what_is_taken_always_gains_and_nothing_cheaper_suffices(
    now: float, offers: list[tuple[Remedy, float]], steady: bool
) -> None:
    order = {"routes": 0, "flip": 1, "replan": 2}
    made = [offer(*one) for one in sorted(offers, key=lambda one: (order[one[0]], one[1]))]
    decision = act(found(now, *made), steady=steady)
    if decision.action == "keep":
        assert decision.candidate is None
        return
    chosen = decision.candidate
    assert chosen is not None
    assert chosen.served > now * 1800
    best = max(one.served for one in made)
    assert chosen.served >= POLICY.sufficient * best or chosen.remedy == "routes"
    cheaper = made[: made.index(chosen)]
    assert all(one.served < POLICY.sufficient * best or one.served <= chosen.served for one in cheaper)


def test_a_decision_says_its_numbers_as_json() -> None:
    decision = act(found(10.0, offer("routes", 10.0), offer("flip", 20.0)))
    shown = json.loads(json.dumps(decision.document()))
    assert shown["action"] == "flip"
    assert shown["numbers"]["now_rps"] == 10.0
    assert [one["remedy"] for one in shown["numbers"]["candidates"]] == ["routes", "flip"]
    assert "+100.0%" in decision.text
