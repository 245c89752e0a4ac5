"""The route program: exact shares over shared links, checked without the planner's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.cost import transfer
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.routes import RouteProgram, balanced, best_shares, most_carried, resource_use
from hexgen2.specs.model import Model
from tests.scheduler.support import A100, H100, L40, LATENT, SMALL, cluster, problem


def both_to_both(capacity: float, wire: float) -> RouteProgram:
    """Two prefill and two decode groups; all routes share one wire of ``wire`` requests/s."""
    ends = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    limits = np.full(2, capacity)
    return RouteProgram(limits, limits, ends[:, 0], ends[:, 1], [((("wire",), 1 / wire),)] * 4)


@pytest.mark.parametrize(
    ("capacity", "wire", "value", "group_price", "wire_price"),
    [(3.0, 100.0, 6.0, 1.0, 0.0), (3.0, 4.0, 4.0, 0.0, 4.0)],
)
def test_a_shared_wire_binds_all_routes_together(
    capacity: float, wire: float, value: float, group_price: float, wire_price: float
) -> None:
    found = best_shares(both_to_both(capacity, wire))
    assert found.value == pytest.approx(value)
    assert found.resource_price[("wire",)] == pytest.approx(wire_price, abs=1e-9)
    assert (found.prefill_price + found.decode_price.max()).max() == pytest.approx(group_price, abs=1e-9)


def test_balanced_shares_load_both_phases_evenly() -> None:
    program = both_to_both(3.0, 4.0)
    routes = balanced(program, 4.0)
    assert routes.sum() == pytest.approx(4.0)
    for ends in (program.sources, program.targets):
        assert [routes[ends == group].sum() for group in (0, 1)] == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("fast", [(0, 3), (1, 2)])
def test_of_equal_shares_those_over_fast_links_are_taken(fast: tuple[int, int]) -> None:
    """Each prefill group has a decode group near by; the links to the others could carry as much."""
    ends = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    loads = [((("link", route), 0.01 if route in fast else 0.2),) for route in range(4)]
    program = RouteProgram(np.full(2, 3.0), np.full(2, 3.0), ends[:, 0], ends[:, 1], loads)
    routes = balanced(program, 6.0)
    assert routes == pytest.approx([3.0 if route in fast else 0.0 for route in range(4)], abs=1e-6)


@st.composite
def programs(draw: st.DrawFn) -> RouteProgram:
    groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rates = st.floats(0.1, 20)
    pairs = [(i, j) for i in range(groups[0]) for j in range(groups[1]) if draw(st.booleans())]
    wires = st.tuples(st.integers(0, 2), st.floats(1e-4, 2.0))
    loads = [
        tuple((("wire", wire), seconds) for wire, seconds in dict(draw(st.lists(wires, max_size=3))).items())
        for _ in pairs
    ]
    return RouteProgram(
        np.array([draw(rates) for _ in range(groups[0])]),
        np.array([draw(rates) for _ in range(groups[1])]),
        np.array([i for i, _ in pairs], dtype=int),
        np.array([j for _, j in pairs], dtype=int),
        loads,
    )


@given(programs())
@settings(max_examples=100, deadline=None)
def test_no_group_or_resource_is_loaded_past_its_capacity(program: RouteProgram) -> None:
    found = best_shares(program)
    for routes in (found.routes, balanced(program, found.value)):
        assert routes.sum() == pytest.approx(found.value, rel=1e-6, abs=1e-9)
        for use in resource_use(program, routes).values():
            assert use <= 1 + 1e-5
        for ends, limits in ((program.sources, program.prefill), (program.targets, program.decode)):
            for group, limit in enumerate(limits):
                assert routes[ends == group].sum() <= limit * (1 + 1e-5)


@given(programs())
@settings(max_examples=60, deadline=None)
def test_prices_prove_the_optimum(program: RouteProgram) -> None:
    """Duality: limits at their prices are worth exactly what flows (a resource has one second a second)."""
    found = best_shares(program)
    worth = found.prefill_price @ program.prefill + found.decode_price @ program.decode
    worth += sum(found.resource_price.values())
    assert worth == pytest.approx(found.value, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("model", [SMALL, LATENT], ids=lambda model: model.name)
def test_loads_and_capacities_are_those_of_the_cost_model(model: Model) -> None:
    where = cluster((H100, 2), (A100, 4), (L40, 4), gbps=10, links={(0, 1): 40})
    task = problem(where, model)
    evaluator = Evaluator(task)
    sources = [((0, 2),), ((1, 2), (2, 1))]
    targets = [((1, 2),), ((2, 3),)]
    for first in sources:
        for second in targets:
            source, target = evaluator.choose(first, "prefill"), evaluator.choose(second, "decode")
            assert source is not None
            assert target is not None
            places = evaluator.place([source.template, target.template])
            expected = transfer.route_capacity(task.model, where, places[0], places[1], task.lengths)
            assert evaluator.route(source, target) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_groups_of_very_unlike_rates_are_loaded_to_the_same_precision(spread: float) -> None:
    """Prompts of one token and answers of thousands: one phase is thousands of times as fast as the other."""
    shape = RouteProgram(
        prefill=np.array([1.1862, 0.9478]) * spread,
        decode=np.array([0.4615, 0.3687, 1e-3]),
        sources=np.array([0, 1, 0, 1]),
        targets=np.array([0, 1, 2, 2]),
        loads=[((("link", 0, 1), 1e-6),)] * 4,
    )
    best = best_shares(shape)
    assert best.value == pytest.approx(0.8312, rel=1e-9)
    assert best.decode_price == pytest.approx([1.0, 1.0, 1.0])
    for routes in (best.routes, balanced(shape, best.value), most_carried(shape)):
        loads = np.bincount(shape.targets, weights=routes, minlength=3)
        assert loads == pytest.approx([0.4615, 0.3687, 1e-3], rel=1e-6)
