from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.controller.carry import Carrier, Seat, seats_of
from hexgen2.controller.rollout import rollout, units
from hexgen2.specs.plan import Role, Stage
from tests.controller.cases import long_answers, plan, setting

CARRIER = Carrier(setting(long_answers()))


def seat(name: str, *gpus: str) -> Seat:
    roles: dict[str, Role] = {"p": "prefill", "d": "decode", "c": "colocated"}
    return Seat(name, roles[name[0]], (Stage(gpus=gpus, tp=len(gpus), first_layer=0, layers=12),))


def names(seats: tuple[Seat, ...]) -> set[str]:
    return {one.id for one in seats}


def test_changes_that_share_gpus_are_one() -> None:
    old = (seat("c0", "n0/0"), seat("c1", "n0/1"), seat("c2", "n1/0", "n1/1"))
    new = (seat("c3", "n0/0", "n0/1"), seat("c4", "n1/0"), seat("c5", "n1/1"), seat("c6", "n2/0"))
    found = {(frozenset(names(unit.stops)), frozenset(names(unit.starts))) for unit in units(old, new)}
    assert found == {
        (frozenset({"c0", "c1"}), frozenset({"c3"})),
        (frozenset({"c2"}), frozenset({"c4", "c5"})),
        (frozenset(), frozenset({"c6"})),
    }


def test_nothing_changes_in_no_wave() -> None:
    assert rollout(CARRIER, seats_of(plan()), seats_of(plan())) == ()


def test_what_can_wait_serves_meanwhile() -> None:
    # Two equal colocated groups are exchanged: one after the other, so that one always serves.
    old = (seat("c0", "n0/0", "n0/1"), seat("c1", "n1/0", "n1/1"))
    new = (seat("c2", "n0/0", "n0/1"), seat("c3", "n1/0", "n1/1"))
    waves = rollout(CARRIER, old, new, min_serving=0.5)
    assert len(waves) == 2
    assert all(wave.rps > 0 for wave in waves)


def test_free_gpus_cost_nothing() -> None:
    old = (seat("c0", "n0/0", "n0/1"),)
    (wave,) = rollout(CARRIER, old, (*old, seat("c1", "n1/0", "n1/1")))
    assert names(wave.serving) == {"c0"}
    assert wave.rps == pytest.approx(CARRIER.best(old).rps)


def test_a_single_group_cannot_serve_while_it_is_exchanged() -> None:
    old, new = (seat("c0", "n0/0", "n0/1"),), (seat("c1", "n0/0", "n0/1"),)
    (wave,) = rollout(CARRIER, old, new)
    assert wave.rps == 0


GPUS = [f"n{node}/{gpu}" for node in range(4) for gpu in range(2)]


@st.composite
def layouts(draw: st.DrawFn, first: int) -> tuple[Seat, ...]:
    """Groups of one or two GPUs in any roles, named from ``first`` on."""
    gpus = draw(st.permutations(GPUS))
    sizes = draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=4))
    found: list[Seat] = []
    for place, size in enumerate(sizes):
        taken, gpus = gpus[:size], gpus[size:]
        role = draw(st.sampled_from("pdc"))
        found.append(seat(f"{role}{first + place}", *taken))
    return tuple(found)


@settings(max_examples=60, deadline=None)
@given(layouts(0), layouts(100), st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_change_happens_once_and_no_gpu_is_used_twice(
    old: tuple[Seat, ...], fresh: tuple[Seat, ...], keep: int, floor: float
) -> None:
    kept = tuple(one for one in old[:keep] if not any(one.gpus & new.gpus for new in fresh))
    new = (*kept, *fresh)
    waves = rollout(CARRIER, old, new, floor)
    running = {one.id: one for one in old}
    for wave in waves:
        for gone in wave.stops:
            del running[gone.id]
        assert names(wave.serving) <= set(running)
        for started in wave.starts:
            assert not any(started.gpus & one.gpus for one in running.values())
            running[started.id] = started
    assert set(running) == names(new)


@settings(max_examples=40, deadline=None)
@given(layouts(0), layouts(100))
def test_serving_stops_only_where_every_single_change_stops_it(
    old: tuple[Seat, ...], new: tuple[Seat, ...]
) -> None:
    waves = rollout(CARRIER, old, new)
    if waves and waves[0].rps == 0 and CARRIER.best(old).rps > 0:
        for unit in units(old, new):
            if unit.starts:
                left = tuple(one for one in old if one not in unit.stops)
                assert CARRIER.best(left).rps == 0
