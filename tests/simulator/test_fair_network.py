"""Max-min fairness, and transfers in closed form against small time steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.simulator.events import Events
from hexgen2.simulator.network import Network, fair_rates

LOADS = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10), min_size=1), min_size=1, max_size=5
)
CAPACITY = {"a": 10.0, "b": 30.0, "c": 5.0, "d": 100.0}


def test_hand_worked() -> None:
    loads = [{"x": 1.0}, {"x": 1.0, "y": 1.0}, {"y": 1.0}]
    assert fair_rates([1, 1, 1], loads, {"x": 10, "y": 30}) == pytest.approx([5, 5, 25])
    assert fair_rates([0, 1, 2], loads, {"x": 10, "y": 30}) == pytest.approx([0, 10, 10])


@given(loads=LOADS, data=st.data())
def test_rates_are_feasible_and_max_min(loads: list[dict[str, float]], data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=len(loads), max_size=len(loads)))
    rates = fair_rates(counts, loads, CAPACITY)
    used = {
        resource: sum(
            count * rate * load.get(resource, 0.0)
            for count, rate, load in zip(counts, rates, loads, strict=True)
        )
        for resource in CAPACITY
    }
    for resource, amount in used.items():
        assert amount <= CAPACITY[resource] * (1 + 1e-9)
    for count, rate, load in zip(counts, rates, loads, strict=True):
        if count == 0:
            assert rate == 0
            continue
        # A full resource on which no other goes faster holds it back: it could gain only from a slower one.
        assert any(
            used[resource] >= CAPACITY[resource] * (1 - 1e-9)
            and all(
                other <= rate * (1 + 1e-9)
                for other, theirs in zip(rates, loads, strict=True)
                if resource in theirs
            )
            for resource in load
        )


@settings(max_examples=30, deadline=None)
@given(
    loads=LOADS,
    starts=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 5), st.floats(1, 50)), min_size=1, max_size=8),
)
def test_against_small_time_steps(
    loads: list[dict[str, float]], starts: list[tuple[int, float, float]]
) -> None:
    jobs = [(place % len(loads), start, tokens) for place, start, tokens in starts]
    events = Events()
    network = Network(
        events,
        {place: dict(load) for place, load in enumerate(loads)},
        dict.fromkeys(range(len(loads)), 0.25),
        CAPACITY,
    )
    ends: dict[int, float] = {}

    def begin(number: int) -> None:
        route, _, tokens = jobs[number]
        network.start(route, tokens, lambda done: ends.__setitem__(done, events.now), number)

    for number, (_, start, _) in enumerate(jobs):
        events.at(start, begin, number)
    while events.step():
        pass
    expected = _by_small_steps(jobs, loads)
    for number, end in expected.items():
        assert ends[number] == pytest.approx(end + 0.25, abs=0.02 + 0.002 * end)


def _by_small_steps(jobs: list[tuple[int, float, float]], loads: list[dict[str, float]]) -> dict[int, float]:
    """Fluid transfers, exact between changes: go to the next start or end, whichever comes first."""
    time, left, ends = 0.0, {}, {}
    waiting = sorted(range(len(jobs)), key=lambda number: jobs[number][1])
    while waiting or left:
        counts = [sum(jobs[number][0] == route for number in left) for route in range(len(loads))]
        rates = fair_rates(counts, loads, CAPACITY)
        until = [remaining / rates[jobs[number][0]] for number, remaining in left.items()]
        step = min([*until, *([jobs[waiting[0]][1] - time] if waiting else [])])
        time += step
        for number in list(left):
            left[number] -= rates[jobs[number][0]] * step
            if left[number] <= 1e-9:
                ends[number] = time
                del left[number]
        while waiting and jobs[waiting[0]][1] <= time + 1e-12:
            number = waiting.pop(0)
            left[number] = jobs[number][2]
    return ends


def test_routes_that_share_nothing_do_not_slow_each_other() -> None:
    events = Events()
    ends: list[float] = []
    network = Network(events, {0: {"a": 1.0}, 1: {"b": 1.0}}, {0: 0.0, 1: 0.0}, CAPACITY)
    for route in (0, 1, 1):
        network.start(route, 30, lambda _: ends.append(events.now), None)
    while events.step():
        pass
    assert ends == pytest.approx([2, 2, 3])
