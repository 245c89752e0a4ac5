"""Groups that lose time by handing KV caches over."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hexgen2.cost import CostModel, Efficiencies, Profile, default_efficiency, shape
from hexgen2.simulator import Requests, offline, simulate
from hexgen2.simulator.placement import placement
from hexgen2.specs import Lengths, Plan

MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(make_plan: MakePlan) -> Plan:
    groups = [("p", "prefill", 1, 32, [(1, 8)]), ("d", "decode", 1, 32, [(1, 8)])]
    return make_plan(groups, [("p", "d", 1.0)])


def costing(cost: CostModel, plan: Plan, **seconds: float) -> CostModel:
    """The cost model with these efficiencies changed."""
    gpu = plan.cluster.gpus[0].type
    changed = default_efficiency(gpu).model_copy(update=seconds)
    profile = Profile(name="busy", source="test", date="2026-01-01", engine="none", gpus={gpu.name: changed})
    return CostModel(cost.model, Efficiencies([profile]), cost.settings)


def at(times: list[float], inputs: list[int], outputs: list[int]) -> Requests:
    return Requests(np.array(times), np.array(inputs), np.array(outputs))


def test_a_request_waits_beyond_the_link(plan: Plan, cost: CostModel) -> None:
    """A request alone: the wait, and what the engine loses in its first step. Sending costs it nothing."""
    cache = 700 * cost.model.kv_bytes_per_token
    requests = at([0.0], [700], [3])
    changes = {
        "handoff_wait_s": 0.1,
        "handoff_wait_byte_s": 1e-9,
        "handoff_overhead_s": 0.05,
        "handoff_byte_s": 2e-9,
        "send_overhead_s": 1.0,
    }
    plain, slower = (simulate(plan, each, requests).timeline for each in (cost, costing(cost, plan, **changes)))
    assert slower.first[0] - plain.first[0] == pytest.approx(0.15 + cache * 3e-9)
    assert slower.end[0] - slower.first[0] == pytest.approx(plain.end[0] - plain.first[0])


@pytest.mark.parametrize(("send_s", "sent"), [(1e-4, 1), (0.5, 2)])
def test_the_next_prompt_waits_while_a_cache_is_sent(
    plan: Plan, cost: CostModel, send_s: float, sent: int
) -> None:
    """Three prompts that fill a batch each. The second is under way when the first's cache leaves; the third
    begins when both are done. If sending takes so long that the second's cache leaves meanwhile, it waits for
    that too."""
    requests = at([0.0, 0.0, 0.0], [1000, 1000, 1000], [2, 2, 2])
    slow = costing(cost, plan, send_overhead_s=send_s)
    plain, slower = (simulate(plan, each, requests).timeline for each in (cost, slow))
    assert slower.prefilled[1] == plain.prefilled[1]
    assert slower.prefilled[2] - plain.prefilled[2] == pytest.approx(sent * send_s)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_at_saturation_groups_reach_the_capacity_that_counts_hand_overs(
    plan: Plan, cost: CostModel, role: str
) -> None:
    """The one that is the bottleneck: answers are short before a prefill group, long before a decode group."""
    slow = costing(
        cost, plan, send_overhead_s=0.01, send_byte_s=1e-9, handoff_overhead_s=0.01, handoff_byte_s=1e-9
    )
    lengths = Lengths(np.full(600, 400), np.full(600, 2 if role == "prefill" else 200))
    layout = shape(plan.cluster, placement(plan, plan.group_by_id["p"]))
    prefill = slow.prefill_capacity(layout, lengths).rps
    decode = slow.decode_capacity(layout, lengths).rps
    rps = min(prefill, decode)
    assert (rps == prefill) == (role == "prefill")
    ends = np.sort(simulate(plan, slow, offline(lengths)).timeline.end)
    measured = 300 / (ends[449] - ends[149])
    assert measured == pytest.approx(rps, rel=0.06)
