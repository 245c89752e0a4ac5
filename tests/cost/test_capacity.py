"""Capacities: hand-worked values, the definition by exhaustive search, and what must never happen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.cost import CostModel, Efficiencies, Moments, Settings, StageShape
from hexgen2.cost.capacity import memory_batch
from hexgen2.cost.layout import Layout
from hexgen2.cost.profile import Efficiency
from hexgen2.specs import GIB, GpuType, Lengths, Link, Model, MoE

HEAD_READ = 10_000 * 1000 * 2 / 100e9
LAYER_READ = 18e6 / 100e9


def fixed(inputs: int, outputs: int) -> Lengths:
    return Lengths(np.array([inputs]), np.array([outputs]))


class TestMoments:
    def test_hand_worked(self) -> None:
        # (100, 3): contexts 101, 102, 103; (10, 1): context 11. Four resident steps: mean 317/4.
        moments = Moments.of(Lengths(np.array([100, 10]), np.array([3, 1])))
        assert moments.input == 55
        assert moments.input_sq == (10_000 + 100) / 2
        assert moments.output == 2
        assert moments.context == pytest.approx(317 / 4)
        squares = (101**2 + 102**2 + 103**2 + 11**2) / 4
        assert moments.context_std == pytest.approx((squares - (317 / 4) ** 2) ** 0.5)
        assert (moments.longest_input, moments.longest) == (100, 103)

    @given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=20))
    def test_against_enumeration_of_resident_steps(self, pairs: list[tuple[int, int]]) -> None:
        contexts = np.array([i + j for i, o in pairs for j in range(1, o + 1)], dtype=float)
        moments = Moments.of(Lengths(np.array([i for i, _ in pairs]), np.array([o for _, o in pairs])))
        assert moments.context == pytest.approx(contexts.mean())
        assert moments.context_std == pytest.approx(contexts.std(), abs=1e-4)

    def test_no_requests(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            Moments.of(Lengths(np.array([], dtype=np.int64), np.array([], dtype=np.int64)))


class TestPrefill:
    def test_hand_worked(self, exact: CostModel, gpu: GpuType) -> None:
        # Budget 1000: 4 prompts of 250; 18 ms of products and 4·250² = 250 000: 0.5 ms of attention a layer.
        capacity = exact.prefill_capacity((StageShape(gpu, 1, 4),), fixed(250, 10))
        assert (capacity.batch_requests, capacity.max_batch) == (4, 8)
        assert capacity.rps == pytest.approx(4 / (4 * 18.5e-3 + HEAD_READ))
        assert capacity.latency_s == pytest.approx(4 * (4.5e-3 + 0.125e-3) + HEAD_READ)
        assert capacity.bottleneck_stage == 0

    def test_a_pipeline_is_as_fast_as_its_slowest_stage(self, exact: CostModel, gpu: GpuType) -> None:
        layout = (StageShape(gpu, 1, 1), StageShape(gpu, 1, 3, upstream=gpu.link))
        capacity = exact.prefill_capacity(layout, fixed(250, 10))
        assert capacity.bottleneck_stage == 1
        assert capacity.rps == pytest.approx(4 / exact.prefill_stage_seconds(layout, [250] * 4)[1])
        assert capacity.latency_s == pytest.approx(exact.prefill_seconds(layout, [250]))

    def test_long_prompts_cost_more_than_their_mean(self, exact: CostModel, gpu: GpuType) -> None:
        mixed = Lengths(np.array([50, 450]), np.array([10, 10]))
        layout = (StageShape(gpu, 1, 4),)
        assert exact.prefill_capacity(layout, mixed).rps < exact.prefill_capacity(layout, fixed(250, 10)).rps

    def test_nothing_where_the_longest_prompt_does_not_fit(self, exact: CostModel, gpu: GpuType) -> None:
        small = gpu.model_copy(update={"name": "small", "memory_bytes": 0.2 * GIB})
        layout = (StageShape(small, 1, 4),)
        tokens = exact.max_kv_tokens(layout)
        assert exact.prefill_capacity(layout, fixed(tokens + 1, 1)).rps == 0
        assert exact.prefill_capacity(layout, fixed(tokens, 1)).rps > 0


class TestDecode:
    def test_hand_worked(self, exact: CostModel, gpu: GpuType) -> None:
        # max_batch 8; contexts 101 … 110, mean 105.5: 844 tokens, 1.688 MB a layer.
        capacity = exact.decode_capacity((StageShape(gpu, 1, 4),), fixed(100, 10))
        step = 4 * (LAYER_READ + 844 * 2000 / 100e9) + HEAD_READ
        assert capacity.max_batch == 8
        assert capacity.tpot_s == pytest.approx(step)
        assert capacity.rps == pytest.approx(8 / (10 * step))
        assert not capacity.kv_limited

    def test_memory_limits_the_batch(self, exact: CostModel, gpu: GpuType) -> None:
        small = gpu.model_copy(update={"name": "small", "memory_bytes": 0.2 * GIB})
        layout = (StageShape(small, 1, 4),)
        tokens = exact.max_kv_tokens(layout)
        lengths = fixed(tokens // 4, 1)
        capacity = exact.decode_capacity(layout, lengths)
        assert capacity.kv_limited
        assert capacity.max_batch == 3  # a quarter each, but one token and half a block on top
        assert exact.decode_capacity(layout, fixed(tokens, 1)).rps == 0

    def test_target_that_cannot_be_met(self, exact: CostModel, gpu: GpuType) -> None:
        capacity = exact.decode_capacity((StageShape(gpu, 1, 4),), fixed(100, 10), tpot_s=1e-6)
        assert (capacity.rps, capacity.max_batch) == (0.0, 0)


class TestColocated:
    def test_hand_worked(self, exact: CostModel, gpu: GpuType) -> None:
        # 8 decoding; 0.8 prompts an iteration: 1 − e^−0.8 of them carry 0.8/(1 − e^−0.8) prompts of 250 tokens.
        capacity = exact.colocated_capacity((StageShape(gpu, 1, 4),), fixed(250, 10))
        part = 1 - math.exp(-0.8)
        prompts = 0.8 / part
        context = 8 * 255.5 * 2000 / 100e9
        mixed = 2 * 9e6 * (8 + prompts * 250) / 1e12 + 2 * 1000 * prompts * 250**2 / 1e12 + context
        alone = LAYER_READ + context
        step = 4 * (part * mixed + (1 - part) * alone) + HEAD_READ
        assert capacity.max_batch == 8
        assert capacity.rps == pytest.approx(8 / (10 * step))
        assert capacity.latency_s == pytest.approx(4 * (4.5e-3 + 0.125e-3) + HEAD_READ)

    def test_the_token_budget_limits_the_batch(self, exact: CostModel, gpu: GpuType) -> None:
        # 1 + 500/2 tokens for each decoding sequence: 3 of them in 1000 tokens.
        assert exact.colocated_capacity((StageShape(gpu, 1, 4),), fixed(500, 2)).max_batch == 3

    def test_never_beats_prefill_alone(self, exact: CostModel, gpu: GpuType) -> None:
        layout = (StageShape(gpu, 1, 4),)
        lengths = fixed(250, 10)
        assert exact.colocated_capacity(layout, lengths).rps < exact.prefill_capacity(layout, lengths).rps


GPU = GpuType(
    name="round",
    vendor="nvidia",
    generation="ampere",
    memory_bytes=1.5 * GIB,
    flops=1e12,
    dense_dtype="bf16",
    memory_bandwidth=100e9,
    link_kind="test",
    link=Link(bandwidth=10e9, latency=10e-6),
)
SETTINGS = Settings(runtime_bytes=0.0, communicator_bytes=0.0, token_budget=512, max_batch=64)


def model_of(layers: int = 8, moe: bool = False) -> Model:
    return Model(
        name="m",
        layers=layers,
        hidden_size=1024,
        heads=8,
        kv_heads=4,
        head_dim=128,
        intermediate_size=2048,
        vocab_size=8000,
        max_positions=4096,
        moe=MoE(experts=8, active=2, intermediate_size=512) if moe else None,
    )


@st.composite
def layouts(draw: st.DrawFn, layers: int = 8) -> Layout:
    """Up to three stages of TP 1, 2 or 4."""
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=2)))
    sizes = [end - start for start, end in zip([0, *cuts], [*cuts, layers], strict=True)]
    stages = []
    for place, size in enumerate(sizes):
        tp = draw(st.sampled_from([1, 2, 4]))
        upstream = Link(bandwidth=1e9, latency=1e-4) if place else None
        stages.append(StageShape(GPU, tp, size, GPU.link if tp > 1 else None, upstream))
    return tuple(stages)


LENGTHS = st.lists(st.tuples(st.integers(1, 1500), st.integers(1, 400)), min_size=1, max_size=6).map(
    lambda rows: Lengths(np.array([i for i, _ in rows]), np.array([o for _, o in rows]))
)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), lengths=LENGTHS, moe=st.booleans(), target=st.none() | st.floats(1e-4, 0.2))
def test_decode_capacity_is_the_best_of_all_batches(
    layout: Layout, lengths: Lengths, moe: bool, target: float | None
) -> None:
    cost = CostModel(model_of(moe=moe), Efficiencies(), SETTINGS)
    found = cost.decode_capacity(layout, lengths, target)
    moments = cost.moments(lengths)
    fitting = min(SETTINGS.max_batch, memory_batch(moments, cost.max_kv_tokens(layout), SETTINGS))
    best = 0.0
    for batch in range(1, fitting + 1):
        cycle = cost.decode_step_seconds(layout, batch, batch * moments.context)
        if target is None or cycle <= target:
            best = max(best, batch / (moments.output * cycle))
    assert found.rps == pytest.approx(best, rel=1e-9)
    if target is not None and found.max_batch:
        assert found.tpot_s <= target


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), lengths=LENGTHS, moe=st.booleans(), target=st.none() | st.floats(1e-4, 0.2))
def test_prompts_apart_from_decoding_are_never_faster(
    layout: Layout, lengths: Lengths, moe: bool, target: float | None
) -> None:
    """Chunked prefill shares one reading of the weights and the fixed times of an iteration."""
    shared = CostModel(model_of(moe=moe), Efficiencies(), SETTINGS)
    apart = replace(shared, settings=replace(SETTINGS, chunked_prefill=False))
    both = shared.colocated_capacity(layout, lengths, target)
    assert apart.colocated_capacity(layout, lengths, target).rps <= both.rps * (1 + 1e-9)
    assert apart.prefill_capacity(layout, lengths) == shared.prefill_capacity(layout, lengths)
    assert apart.decode_capacity(layout, lengths, target) == shared.decode_capacity(layout, lengths, target)


@settings(max_examples=60, deadline=None)
@given(
    mean=st.floats(20, 3000), spread=st.floats(0, 2000), room=st.integers(100, 10**6), block=st.integers(1, 64)
)
def test_memory_batch_is_the_largest_with_headroom(mean: float, spread: float, room: int, block: int) -> None:
    chosen = Settings(block_size=block)
    moments = Moments(
        input=1, input_sq=1, output=1, context=mean, context_std=spread, longest_input=1, longest=100
    )
    batch = memory_batch(moments, room, chosen)

    def needed(count: int) -> float:
        return count * (mean + (block - 1) / 2) + 2 * spread * count**0.5

    assert batch == 1 or needed(batch) <= room * (1 + 1e-9)
    assert needed(batch + 1) > room * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), a=st.integers(1, 3000), b=st.integers(0, 3000), moe=st.booleans())
def test_more_tokens_are_never_faster(layout: Layout, a: int, b: int, moe: bool) -> None:
    cost = CostModel(model_of(moe=moe), Efficiencies(), SETTINGS)
    assert cost.prefill_seconds(layout, [a + b]) >= cost.prefill_seconds(layout, [a]) * (1 - 1e-12)
    # The attention of several prompts is spread evenly over their chunks, which may shift a little of it.
    assert cost.prefill_seconds(layout, [a, 5]) >= cost.prefill_seconds(layout, [a]) * (1 - 2e-3)
    batch = 1 + a % 64
    step = cost.decode_step_seconds(layout, batch, batch * a)
    assert cost.decode_step_seconds(layout, batch, batch * (a + b)) >= step
    # One more of the same context each. (With the same context in all a pipeline gains by splitting it.)
    assert cost.decode_step_seconds(layout, batch + 1, (batch + 1) * a) >= step * (1 - 1e-12)


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), lengths=LENGTHS, factor=st.floats(1.0, 4.0), moe=st.booleans())
@pytest.mark.parametrize("figure", ["flops", "memory_bandwidth", "memory_bytes", "link"])
def test_a_better_gpu_never_has_less_capacity(
    figure: str, layout: Layout, lengths: Lengths, factor: float, moe: bool
) -> None:
    def improved(stage: StageShape) -> StageShape:
        if figure != "link":
            better = stage.gpu.model_copy(update={figure: getattr(stage.gpu, figure) * factor})
            return StageShape(better, stage.tp, stage.layers, stage.link, stage.upstream)
        links = [
            link and Link(bandwidth=link.bandwidth * factor, latency=link.latency / factor)
            for link in (stage.link, stage.upstream)
        ]
        return StageShape(stage.gpu, stage.tp, stage.layers, *links)

    cost = CostModel(model_of(moe=moe), Efficiencies(), SETTINGS)
    better = tuple(improved(stage) for stage in layout)
    slack = 1 - 1e-9
    assert cost.prefill_capacity(better, lengths).rps >= cost.prefill_capacity(layout, lengths).rps * slack
    for target in (None, 0.05):
        before, after = (cost.decode_capacity(each, lengths, target).rps for each in (layout, better))
        assert after >= before * slack
        before, after = (cost.colocated_capacity(each, lengths, target).rps for each in (layout, better))
        assert after >= before * slack


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, layers=st.integers(1, 12), tp=st.sampled_from([1, 2, 4]), moe=st.booleans())
def test_more_layers_are_never_faster(lengths: Lengths, layers: int, tp: int, moe: bool) -> None:
    link = GPU.link if tp > 1 else None
    shallow, deep = (
        (CostModel(model_of(count, moe), Efficiencies(), SETTINGS), (StageShape(GPU, tp, count, link),))
        for count in (layers, layers + 1)
    )
    for role in ("prefill_capacity", "decode_capacity", "colocated_capacity"):
        less, more = (getattr(cost, role)(layout, lengths).rps for cost, layout in (shallow, deep))
        assert more <= less * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(layout=layouts(), lengths=LENGTHS, speed=st.floats(0.1, 10))
def test_capacities_scale_with_the_speed_of_everything(layout: Layout, lengths: Lengths, speed: float) -> None:
    """Without overheads, hardware that is x times as fast in every figure serves x times the requests."""

    def scaled(stage: StageShape) -> StageShape:
        links = [
            link and Link(bandwidth=link.bandwidth * speed, latency=link.latency / speed)
            for link in (stage.link, stage.upstream)
        ]
        gpu = stage.gpu.model_copy(
            update={
                "flops": stage.gpu.flops * speed,
                "memory_bandwidth": stage.gpu.memory_bandwidth * speed,
            }
        )
        return StageShape(gpu, stage.tp, stage.layers, *links)

    cost = CostModel(model_of(), _WithoutOverheads(), SETTINGS)
    faster = tuple(scaled(stage) for stage in layout)
    for role in ("prefill_capacity", "decode_capacity", "colocated_capacity"):
        before, after = (getattr(cost, role)(each, lengths).rps for each in (layout, faster))
        assert after == pytest.approx(before * speed)


class _WithoutOverheads(Efficiencies):
    def of(self, gpu: GpuType) -> Efficiency:
        return super().of(gpu).model_copy(update={"layer_overhead_s": 0.0, "step_overhead_s": 0.0})


def test_a_layout_of_other_layers_is_refused(exact: CostModel, gpu: GpuType) -> None:
    with pytest.raises(ValueError, match="3 layers"):
        exact.max_kv_tokens((StageShape(gpu, 1, 3),))
