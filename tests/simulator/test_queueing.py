"""Waiting times against queueing theory: Lindley's recursion exactly, M/D/1 and M/G/1 in the mean.

Prompts of whole token budgets are computed one by one, so a group is a single server.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hexgen2.cost import CostModel, shape
from hexgen2.simulator import Requests, poisson, simulate
from hexgen2.simulator.placement import placement
from hexgen2.specs import Lengths, Plan
from hexgen2.specs.workload import FloatArray, IntArray

COUNT = 60_000


@pytest.fixture
def split(make_plan: Callable[..., Plan]) -> Plan:
    """A prefill group, and a decode group that is never the bottleneck."""
    groups = [("p", "prefill", 1.0, 32, [(1, 8)]), ("d", "decode", 1.0, 32, [(1, 8)])]
    return make_plan(groups, [("p", "d", 1.0)], gbps=8000)


@pytest.fixture
def colocated(make_plan: Callable[..., Plan]) -> Plan:
    """One group that does both; answers of one token end with the prompt."""
    return make_plan([("c", "colocated", 1.0, 32, [(1, 8)])])


def run(plan: Plan, cost: CostModel, inputs: IntArray, load: float) -> tuple[Requests, FloatArray, FloatArray]:
    """Requests at a load of the first group; seconds that each prompt waits, and is computed."""
    layout = shape(plan.cluster, placement(plan, plan.groups[0]))
    known = {length: cost.prefill_seconds(layout, [length]) for length in np.unique(inputs).tolist()}
    service = np.array([known[length] for length in inputs.tolist()])
    lengths = Lengths(inputs, np.ones(len(inputs), dtype=np.int64))
    requests = poisson(lengths, load / service.mean(), np.random.default_rng(5))
    timeline = simulate(plan, cost, requests).timeline
    return requests, timeline.prefilled - timeline.arrival - service, service


def lindley(arrivals: FloatArray, service: FloatArray) -> FloatArray:
    """Waiting times of a single server: W' = max(0, W + S − gap)."""
    waits = np.zeros(len(arrivals))
    for n in range(1, len(arrivals)):
        waits[n] = max(0.0, waits[n - 1] + service[n - 1] - (arrivals[n] - arrivals[n - 1]))
    return waits


@pytest.mark.parametrize("load", [0.3, 0.8])
@pytest.mark.parametrize("kind", ["split", "colocated"])
def test_lindley(request: pytest.FixtureRequest, cost: CostModel, kind: str, load: float) -> None:
    inputs = np.random.default_rng(1).choice([1000, 2000, 3000], size=2000)
    requests, waits, service = run(request.getfixturevalue(kind), cost, inputs, load)
    np.testing.assert_allclose(waits, lindley(requests.arrivals_s, service), atol=1e-8)


def test_m_d_1(colocated: Plan, cost: CostModel) -> None:
    requests, waits, service = run(colocated, cost, np.full(COUNT, 1000), 0.5)
    load = service[0] * COUNT / requests.arrivals_s[-1]
    assert waits.mean() == pytest.approx(load * service[0] / (2 * (1 - load)), rel=0.02)


def test_m_g_1(colocated: Plan, cost: CostModel) -> None:
    inputs = np.random.default_rng(3).choice([1000, 3000], p=[0.7, 0.3], size=COUNT)
    requests, waits, service = run(colocated, cost, inputs, 0.5)
    rate = COUNT / requests.arrivals_s[-1]
    expected = rate * (service**2).mean() / (2 * (1 - rate * service.mean()))
    assert waits.mean() == pytest.approx(expected, rel=0.02)
