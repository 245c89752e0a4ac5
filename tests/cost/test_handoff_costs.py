"""What handing KV caches over costs both groups, on the round GPU type (2000 bytes a token and layer)."""

from __future__ import annotations

import numpy as np
import pytest

from hexgen2.cost import CostModel, Efficiencies, Efficiency, Profile, StageShape
from hexgen2.cost.capacity import handover_wait
from hexgen2.cost.queues import prompt_queue
from hexgen2.cost.stage import stage_cost
from hexgen2.specs import GpuType, Lengths, Model

LENGTHS = Lengths(np.array([250]), np.array([10]))
CACHE_BYTES = 250 * 4 * 2000


@pytest.fixture
def busy(full_speed: Efficiency) -> Efficiency:
    """Sending costs 1 ms and 1 ns a byte, taking over twice and waiting three times as much."""
    return full_speed.model_copy(
        update={
            "send_overhead_s": 1e-3,
            "send_byte_s": 1e-9,
            "handoff_overhead_s": 2e-3,
            "handoff_byte_s": 2e-9,
            "handoff_wait_s": 3e-3,
            "handoff_wait_byte_s": 3e-9,
        }
    )


@pytest.fixture
def sending(exact: CostModel, busy: Efficiency) -> CostModel:
    profile = Profile(name="busy", source="test", date="2026-01-01", engine="none", gpus={"round": busy})
    return CostModel(exact.model, Efficiencies([profile]), exact.settings)


def test_a_prefill_group_sends_beside_its_prompts(exact: CostModel, sending: CostModel, gpu: GpuType) -> None:
    layout = (StageShape(gpu, 1, 4),)
    plain, slower = (cost.prefill_capacity(layout, LENGTHS) for cost in (exact, sending))
    assert 1 / slower.rps - 1 / plain.rps == pytest.approx(1e-3 + CACHE_BYTES * 1e-9)
    assert slower.latency_s == plain.latency_s, "a prompt alone is sent when it is done"


def test_each_stage_sends_its_part_and_the_first_the_overhead(sending: CostModel, gpu: GpuType) -> None:
    layout = (StageShape(gpu, 1, 3), StageShape(gpu, 2, 1, gpu.link, upstream=gpu.link))
    first, second = sending.compiled(layout).costs
    assert first.sending_s(1, 250) == pytest.approx(1e-3 + 3 / 4 * CACHE_BYTES * 1e-9)
    assert second.sending_s(1, 250) == pytest.approx(1 / 4 / 2 * CACHE_BYTES * 1e-9)


@pytest.mark.parametrize(("tp", "part"), [(1, 1.0), (4, 1 / 4), (8, 1 / 4)])
def test_a_gpu_has_the_heads_that_it_holds(
    model: Model, gpu: GpuType, busy: Efficiency, tp: int, part: float
) -> None:
    """Of 4 KV heads; more GPUs hold copies."""
    cost = stage_cost(model, StageShape(gpu, tp, 4, gpu.link), busy, 0, True)
    sent = part * 250 * 4 * 2000
    assert cost.sending_s(2, 500) == pytest.approx(2 * (1e-3 + sent * 1e-9))
    taken = cost.seconds(5, 0, 50, 5, taken=2, taken_tokens=500) - cost.seconds(5, 0, 50, 5)
    assert taken == pytest.approx(2 * (2e-3 + sent * 2e-9))
    assert handover_wait([cost], 250) == pytest.approx(3e-3 + sent * 3e-9)


def test_a_decode_group_takes_over_a_cache_for_each_answer(
    exact: CostModel, sending: CostModel, gpu: GpuType
) -> None:
    layout = (StageShape(gpu, 1, 4),)
    plain, slower = (cost.decode_capacity(layout, LENGTHS) for cost in (exact, sending))
    assert 1 / slower.rps - 1 / plain.rps == pytest.approx(2e-3 + CACHE_BYTES * 2e-9)


def test_colocated_groups_hand_nothing_over(exact: CostModel, sending: CostModel, gpu: GpuType) -> None:
    layout = (StageShape(gpu, 1, 4),)
    assert sending.colocated_capacity(layout, LENGTHS) == exact.colocated_capacity(layout, LENGTHS)


def test_prompts_wait_for_caches_that_are_sent(exact: CostModel, sending: CostModel, gpu: GpuType) -> None:
    costs = [cost.compiled((StageShape(gpu, 1, 4),)).costs for cost in (exact, sending)]
    moments = exact.moments(LENGTHS)
    plain, slower = (prompt_queue(each, moments, 4, exact.settings) for each in costs)
    assert slower.server.mean_s - plain.server.mean_s == pytest.approx(1e-3 + CACHE_BYTES * 1e-9)
    assert slower.server.fixed_s == pytest.approx(plain.server.fixed_s)
