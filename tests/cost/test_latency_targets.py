"""Goodput of single groups: never above throughput, falling with tighter targets, and as simulated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hexgen2.cost import CostModel, Settings, StageShape, goodput
from hexgen2.cost.goodput import Targets
from hexgen2.cost.layout import Layout
from hexgen2.cost.queues import After, prompt_queue
from hexgen2.specs import GpuType, Lengths
from hexgen2.specs.catalog.gpus import gpu_type
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload

TTFT = [0.2, 0.5, 1.0, 2.0, 8.0]
TPOT = [0.02, 0.04, 0.08, 0.2]


def rate(role: str, cost: CostModel, layout: Layout, lengths: Lengths, targets: Targets) -> tuple[float, float]:
    """(goodput, throughput under the TPOT target) in requests/s."""
    of, moments = cost.compiled(layout), cost.moments(lengths)
    if role == "prefill":
        prefill = cost.prefill_capacity(layout, lengths)
        queue = prompt_queue(of.costs, moments, max(1, prefill.batch_requests), cost.settings)
        return goodput.prefill_goodput(queue, prefill.rps, targets.ttft_s), prefill.rps
    if role == "decode":
        decode = cost.decode_capacity(layout, lengths, targets.tpot_s)
        return goodput.decode_goodput(decode, of.costs, moments), decode.rps
    both = cost.colocated_capacity(layout, lengths, targets.tpot_s)
    return goodput.colocated_goodput(both, of.costs, moments, cost.settings, targets), both.rps


@pytest.fixture(scope="module")
def layouts() -> dict[str, tuple[CostModel, Layout]]:
    a100, h100 = gpu_type("A100-80G-PCIe"), gpu_type("H100-80G-SXM")
    between = gpu_type("L40").link
    cost = CostModel(load_model("llama-2-70b"))
    return {
        "tp4": (cost, (StageShape(h100, 4, 80, h100.link),)),
        "pp2": (cost, (StageShape(a100, 2, 40, a100.link), StageShape(a100, 2, 40, a100.link, between))),
    }


@pytest.mark.parametrize("role", ["prefill", "decode", "colocated"])
@pytest.mark.parametrize("name", ["tp4", "pp2"])
@pytest.mark.parametrize("workload", ["hphd", "lpld"])
def test_tighter_targets_never_give_more(
    layouts: dict[str, tuple[CostModel, Layout]], role: str, name: str, workload: str
) -> None:
    cost, layout = layouts[name]
    lengths = load_workload(workload).representative(64)
    table = np.array(
        [[rate(role, cost, layout, lengths, Targets(ttft, tpot)) for tpot in TPOT] for ttft in TTFT]
    )
    found, most = table[..., 0], table[..., 1]
    assert (found <= most).all()
    assert found.max() > 0.7 * most.max()  # loose targets leave most of the throughput
    margin = 2 * goodput.TOLERANCE * most.max()
    assert (np.diff(found, axis=0) >= -margin).all()
    assert (np.diff(found, axis=1) >= -margin).all()


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 60)), min_size=1, max_size=12),
    st.floats(0.01, 5),
    st.floats(0.0005, 0.5),
    st.integers(1, 3),
    st.sampled_from(["prefill", "decode", "colocated"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_goodput_is_at_most_throughput(
    exact: CostModel,
    gpu: GpuType,
    pairs: list[tuple[int, int]],
    ttft: float,
    tpot: float,
    stages: int,
    role: str,
) -> None:
    split = np.diff(np.linspace(0, 4, stages + 1).astype(int))
    layout = tuple(
        StageShape(gpu, 1, int(layers), upstream=gpu.link if place else None)
        for place, layers in enumerate(split)
    )
    lengths = Lengths(np.array([i for i, _ in pairs]), np.array([o for _, o in pairs]))
    found, most = rate(role, exact, layout, lengths, Targets(ttft, tpot))
    assert 0 <= found <= most


def test_what_follows_the_prefill_takes_from_its_time(layouts: dict[str, tuple[CostModel, Layout]]) -> None:
    cost, layout = layouts["tp4"]
    moments = cost.moments(load_workload("hphd").representative(64))
    capacity = cost.prefill_capacity(layout, moments)
    queue = prompt_queue(cost.compiled(layout).costs, moments, capacity.batch_requests, cost.settings)
    direct = goodput.prefill_goodput(queue, capacity.rps, 1.0)
    slow = goodput.prefill_goodput(queue, capacity.rps, 1.0, After(0.1, 1e-4))
    assert 0 < slow < direct
    assert goodput.prefill_goodput(queue, capacity.rps, 1.0, After(2.0)) == 0
    assert goodput.prefill_goodput(queue, capacity.rps, 1.0, above=direct * 1.01) == 0


def test_handover() -> None:
    """1 s for 1000 tokens on an idle link, at the planned load 1/(1 − load) times as long; 1.5 steps, and one
    more where the cache is asked for between two steps."""
    for between, fixed_s in ((False, 0.06), (True, 0.10)):
        settings = Settings(fetch_between_steps=between)
        after = goodput.handover(1.0, 1000.0, 0.04, settings)
        assert after.per_token_s == pytest.approx(1e-3 / (1 - goodput.LINK_LOAD))
        assert after.fixed_s == pytest.approx(fixed_s)
        assert goodput.handover(0.0, 1000.0, 0.04, settings).per_token_s == 0
