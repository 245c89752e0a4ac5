"""The max-flow network against networkx, and its minimum cut."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.scheduler.flow import Network, cut_value, solve


@st.composite
def networks(draw: st.DrawFn) -> Network:
    sizes = [draw(st.integers(0, 4)) for _ in range(3)]
    capacity = st.one_of(st.just(0.0), st.floats(0.01, 50))

    def some(*shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        return np.array([draw(capacity) for _ in range(count)], dtype=float).reshape(shape)

    return Network(some(sizes[0]), some(sizes[1]), some(sizes[0], sizes[1]), some(sizes[2]))


def reference(network: Network) -> float:
    graph = networkx.DiGraph()
    graph.add_nodes_from(["s", "t"])
    for i, capacity in enumerate(network.prefill):
        graph.add_edge("s", ("pi", i))
        graph.add_edge(("pi", i), ("po", i), capacity=capacity)
    for j, capacity in enumerate(network.decode):
        graph.add_edge(("di", j), ("do", j), capacity=capacity)
        graph.add_edge(("do", j), "t")
    for i, j in np.ndindex(network.routes.shape):
        graph.add_edge(("po", i), ("di", j), capacity=network.routes[i, j])
    return float(networkx.maximum_flow_value(graph, "s", "t")) + float(network.colocated.sum())


@given(networks())
@settings(max_examples=200, deadline=None)
def test_flow_is_maximal_conserved_and_within_capacity(network: Network) -> None:
    flow = solve(network)
    assert flow.value == pytest.approx(reference(network), rel=1e-9, abs=1e-9)
    assert cut_value(flow) == pytest.approx(flow.value, rel=1e-9, abs=1e-9)
    assert np.all(flow.routes <= network.routes * (1 + 1e-9))
    assert np.all(flow.prefill <= network.prefill * (1 + 1e-9))
    assert np.all(flow.decode <= network.decode * (1 + 1e-9))
    assert flow.routes.sum() + network.colocated.sum() == pytest.approx(flow.value, rel=1e-9, abs=1e-9)
    assert flow.value <= network.ceiling * (1 + 1e-9)


@pytest.mark.parametrize(
    ("prefill", "decode", "routes", "value", "cut"),
    [
        ([3.0], [9.0], [[99.0]], 3.0, (("prefill", 0),)),
        ([9.0], [2.0, 1.0], [[99.0, 99.0]], 3.0, (("decode", 0), ("decode", 1))),
        ([9.0], [2.0, 5.0], [[99.0, 1.0]], 3.0, (("route", 0, 1), ("decode", 0))),
    ],
)
def test_the_cut_names_what_is_saturated(
    prefill: list[float],
    decode: list[float],
    routes: list[list[float]],
    value: float,
    cut: tuple[tuple[str | int, ...], ...],
) -> None:
    flow = solve(Network(np.array(prefill), np.array(decode), np.array(routes), np.zeros(0)))
    assert flow.value == pytest.approx(value)
    assert flow.cut == cut
