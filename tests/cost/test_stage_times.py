"""Times of one stage, worked out by hand with the round figures of conftest."""

from __future__ import annotations

import pytest

from hexgen2.cost import CostModel, Efficiencies, Efficiency, StageShape
from hexgen2.cost.stage import moe_layers, stage_cost
from hexgen2.specs import GpuType, Link, Model, MoE

HEAD_READ = 10_000 * 1000 * 2 / 100e9  # LM head: 20 MB at 100 GB/s
LAYER_READ = 18e6 / 100e9


def test_prefill_is_compute_bound_when_long(exact: CostModel, gpu: GpuType) -> None:
    # Per layer 2·9e6·1000 + 2·1000·1000² FLOP at 1 TFLOP/s = 18 ms + 2 ms; LM head of one token reads 20 MB.
    seconds = exact.prefill_seconds((StageShape(gpu, 1, 4),), [1000])
    assert seconds == pytest.approx(4 * (18e-3 + 2e-3) + HEAD_READ)


def test_prefill_is_weight_bound_when_short(exact: CostModel, gpu: GpuType) -> None:
    seconds = exact.prefill_seconds((StageShape(gpu, 1, 4),), [2])
    assert seconds == pytest.approx(4 * LAYER_READ + HEAD_READ)


def test_prompts_of_a_batch_attend_only_to_themselves(exact: CostModel, gpu: GpuType) -> None:
    # 2 prompts of 500: the same 18 ms of products, but Σs² = 500 000: 1 ms of attention.
    seconds = exact.prefill_seconds((StageShape(gpu, 1, 4),), [500, 500])
    assert seconds == pytest.approx(4 * (18e-3 + 1e-3) + HEAD_READ)


def test_a_prompt_over_the_budget_is_cut(exact: CostModel, gpu: GpuType) -> None:
    # 1500 tokens against a budget of 1000: chunks of 1000 and 500, the LM head read in each.
    seconds = exact.prefill_seconds((StageShape(gpu, 1, 4),), [1500])
    assert seconds == pytest.approx(4 * (2 * 9e6 * 1500 + 2 * 1000 * 1500**2) / 1e12 + 2 * HEAD_READ)


def test_decode_reads_weights_and_context(exact: CostModel, gpu: GpuType) -> None:
    # KV per token and layer: 2·4·125·2 = 2000 bytes; 10 000 tokens: 20 MB, 0.2 ms a layer.
    seconds = exact.decode_step_seconds((StageShape(gpu, 1, 4),), 4, 10_000)
    assert seconds == pytest.approx(4 * (LAYER_READ + 0.2e-3) + HEAD_READ)


@pytest.mark.parametrize(("tp", "kv_shards"), [(2, 2), (4, 4), (8, 4)])
def test_tensor_parallel_decode(exact: CostModel, gpu: GpuType, tp: int, kv_shards: int) -> None:
    # Weights over tp, KV over at most 4 shards; 2 all-reduces a layer and one for the embedding of b·H·B bytes.
    batch, context = 4, 10_000
    reduce_s = 2 * (tp - 1) / tp * batch * 2000 / 10e9 + 2 * (tp - 1) * 10e-6
    gather_s = (tp - 1) / tp * batch * 20_000 / 10e9 + (tp - 1) * 10e-6
    expected = 4 * (LAYER_READ / tp + 0.2e-3 / kv_shards) + 9 * reduce_s + HEAD_READ / tp + gather_s
    seconds = exact.decode_step_seconds((StageShape(gpu, tp, 4, gpu.link),), batch, context)
    assert seconds == pytest.approx(expected)


def test_overheads_are_added_per_layer_and_per_stage(
    model: Model, gpu: GpuType, full_speed: Efficiency
) -> None:
    slow = full_speed.model_copy(update={"layer_overhead_s": 1e-3, "step_overhead_s": 5e-3})
    plain, slower = (stage_cost(model, StageShape(gpu, 1, 4), kind, 0, True) for kind in (full_speed, slow))
    assert slower.seconds(10, 0, 0, 10) - plain.seconds(10, 0, 0, 10) == pytest.approx(4e-3 + 5e-3)


def test_each_efficiency_divides_its_own_term(model: Model, gpu: GpuType, full_speed: Efficiency) -> None:
    stage = StageShape(gpu, 2, 4, gpu.link)
    full = stage_cost(model, stage, full_speed, 0, True)
    for field, coefficients in {
        "compute": ("dense_token_s", "moe_token_s", "head_token_s"),
        "attention": ("attention_s",),
        "memory": ("dense_read_s", "moe_read_s", "expert_read_s", "head_read_s"),
        "kv": ("context_s",),
        "link": ("token_s", "gather_s"),
    }.items():
        half = stage_cost(model, stage, full_speed.model_copy(update={field: 0.5}), 0, True)
        for name in full.__slots__:
            factor = 2 if name in coefficients else 1
            assert getattr(half, name) == pytest.approx(factor * getattr(full, name)), (field, name)


class TestTermsOfSomeEngines:
    """What a profile may add (docs/cost-model.md)."""

    @pytest.mark.parametrize(("launch_s", "bound"), [(1e-3, "host"), (1e-5, "device")])
    def test_the_host_and_the_device_work_at_once(
        self, model: Model, gpu: GpuType, full_speed: Efficiency, launch_s: float, bound: str
    ) -> None:
        launching = full_speed.model_copy(update={"layer_launch_s": launch_s, "step_overhead_s": 2e-3})
        cost = stage_cost(model, StageShape(gpu, 1, 4), launching, 0, False)
        layers = 4 * (launch_s if bound == "host" else LAYER_READ)
        # Reading the context (2000 bytes a token and layer) comes on top of either.
        assert cost.seconds(1, 0, 10_000, 1) == pytest.approx(layers + 2e-3 + 4 * 0.2e-3)

    def test_prompts_and_sequences_have_overheads(
        self, model: Model, gpu: GpuType, full_speed: Efficiency
    ) -> None:
        slow = full_speed.model_copy(update={"prompt_overhead_s": 7e-3, "sequence_overhead_s": 1e-4})
        plain, slower = (stage_cost(model, StageShape(gpu, 1, 4), kind, 0, True) for kind in (full_speed, slow))
        assert slower.seconds(5, 0, 50, 5) - plain.seconds(5, 0, 50, 5) == pytest.approx(5e-4)
        assert slower.seconds(5, 25, 0, 1) - plain.seconds(5, 25, 0, 1) == pytest.approx(7e-3 + 1e-4)

    @pytest.mark.parametrize(("first_layer", "times"), [(0, 1), (4, 0)])
    def test_requests_that_begin_cost_the_first_stage_time(
        self, model: Model, gpu: GpuType, full_speed: Efficiency, first_layer: int, times: int
    ) -> None:
        slow = full_speed.model_copy(update={"request_overhead_s": 5e-3, "handoff_overhead_s": 2e-3})
        cost = stage_cost(model, StageShape(gpu, 1, 4), slow, first_layer, False)
        plain = cost.seconds(30, 300, 50, 5)
        assert cost.seconds(30, 300, 50, 5, begun=3) - plain == pytest.approx(times * 15e-3)
        assert cost.seconds(30, 300, 50, 5, taken=2) - plain == pytest.approx(times * 4e-3)

    def test_large_messages_go_slower(self, model: Model, gpu: GpuType, full_speed: Efficiency) -> None:
        # Beyond 100 tokens of 2000 bytes at a quarter of 10 GB/s: 9 all-reduces × 2000 bytes × 0.3 ns more.
        large = full_speed.model_copy(update={"large_link": 0.25, "large_message_bytes": 100 * 2000.0})
        stage = StageShape(gpu, 2, 4, gpu.link)
        plain, slower = (stage_cost(model, stage, kind, 0, True) for kind in (full_speed, large))
        assert slower.seconds(100, 1, 0, 1) == plain.seconds(100, 1, 0, 1)
        extra = slower.seconds(600, 1, 0, 1) - plain.seconds(600, 1, 0, 1)
        assert extra == pytest.approx(500 * 9 * 2000 * 0.3e-9)
        assert stage_cost(model, stage, large.affine(), 0, True) == plain

    @pytest.mark.parametrize(("latency", "hops"), [(10e-6, 2), (11e-6, 6)])
    def test_few_hops_only_on_the_types_own_link(
        self, model: Model, gpu: GpuType, full_speed: Efficiency, latency: float, hops: int
    ) -> None:
        switched = full_speed.model_copy(update={"reduce_hops": 2.0})
        stage = StageShape(gpu, 4, 4, Link(bandwidth=10e9, latency=latency))
        assert stage_cost(model, stage, switched, 0, False).fixed_s == pytest.approx(9 * hops * latency)


class TestPipeline:
    LINK = Link(bandwidth=1e9, latency=100e-6)

    def layout(self, gpu: GpuType, *layers: int) -> tuple[StageShape, ...]:
        return tuple(
            StageShape(gpu, 1, count, upstream=self.LINK if place else None)
            for place, count in enumerate(layers)
        )

    def test_prefill_latency_is_the_sum_of_the_stages(self, exact: CostModel, gpu: GpuType) -> None:
        layout = self.layout(gpu, 3, 1)
        first, second = exact.prefill_stage_seconds(layout, [1000])
        assert first == pytest.approx(3 * 20e-3)
        assert second == pytest.approx(20e-3 + HEAD_READ + 100e-6 + 2e6 / 1e9)
        assert exact.prefill_seconds(layout, [1000]) == pytest.approx(first + second)

    def test_chunks_follow_each_other_through_the_stages(self, exact: CostModel, gpu: GpuType) -> None:
        layout = self.layout(gpu, 3, 1)
        first, second = exact.prefill_stage_seconds(layout, [3000])  # three chunks
        assert exact.prefill_seconds(layout, [3000]) == pytest.approx((first + second) / 3 + 2 * first / 3)

    def test_a_token_over_the_budget_makes_nothing_faster(self, exact: CostModel, gpu: GpuType) -> None:
        """Two even chunks would overlap in the stages and end sooner than one; the engine cuts 1000 + 1."""
        layout = self.layout(gpu, 3, 1)
        assert exact.prefill_seconds(layout, [1001]) > exact.prefill_seconds(layout, [1000])

    def test_decode_cycle_is_set_by_the_slowest_stage(self, exact: CostModel, gpu: GpuType) -> None:
        # Two micro-batches of 4 with 10 000 tokens each; the stage of 3 layers is the slower.
        stage = 3 * (LAYER_READ + 0.2e-3)
        other = LAYER_READ + 0.2e-3 + HEAD_READ + 100e-6 + 4 * 2000 / 1e9
        assert stage > other
        seconds = exact.decode_step_seconds(self.layout(gpu, 3, 1), 8, 20_000)
        assert seconds == pytest.approx(2 * stage)

    def test_one_sequence_alone_passes_all_stages(self, exact: CostModel, gpu: GpuType) -> None:
        alone = exact.decode_step_seconds(self.layout(gpu, 3, 1), 1, 10_000)
        stage = 3 * (LAYER_READ + 0.2e-3)
        other = LAYER_READ + 0.2e-3 + HEAD_READ + 100e-6 + 2000 / 1e9
        assert alone == pytest.approx(stage + other)


class TestMoE:
    @pytest.fixture
    def moe(self, model: Model) -> Model:
        """The round model with 8 experts of 3·10⁶ weights from layer 1 on, 2 of them active."""
        return model.model_copy(
            update={"moe": MoE(experts=8, active=2, intermediate_size=1000, dense_layers=1)}
        )

    @pytest.mark.parametrize(
        ("first", "layers", "expected"), [(0, 1, 0), (0, 4, 3), (1, 3, 3), (2, 2, 2), (0, 2, 1)]
    )
    def test_which_layers_have_experts(self, moe: Model, first: int, layers: int, expected: int) -> None:
        assert moe_layers(moe, first, layers) == expected
        assert moe_layers(moe, first, layers) == sum(moe.is_moe_layer(i) for i in range(first, first + layers))

    @pytest.mark.parametrize(("tokens", "touched"), [(1, 2.0), (2, 3.5), (1000, 8.0)])
    def test_experts_touched(
        self, moe: Model, gpu: GpuType, full_speed: Efficiency, tokens: int, touched: float
    ) -> None:
        cost = stage_cost(moe, StageShape(gpu, 1, 4), full_speed, 0, True)
        assert cost.touched(tokens) == pytest.approx(touched)

    def test_decode_reads_touched_experts_only(
        self, moe: Model, gpu: GpuType, efficiencies: Efficiencies
    ) -> None:
        cost = CostModel(moe, efficiencies)
        shared = 3e6 + 8 * 1000  # attention and router
        dense = LAYER_READ
        for batch, touched in [(1, 2.0), (2, 3.5)]:
            layer = (shared + touched * 3e6) * 2 / 100e9
            seconds = cost.decode_step_seconds((StageShape(gpu, 1, 4),), batch, 0)
            assert seconds == pytest.approx(dense + 3 * layer + HEAD_READ)

    def test_prefill_computes_active_experts_only(
        self, moe: Model, gpu: GpuType, efficiencies: Efficiencies
    ) -> None:
        cost = CostModel(moe, efficiencies)
        layer = (2 * (3e6 + 8000 + 2 * 3e6) * 1000 + 2e9) / 1e12
        seconds = cost.prefill_seconds((StageShape(gpu, 1, 4),), [1000])
        assert seconds == pytest.approx(20e-3 + 3 * layer + HEAD_READ)

    def test_all_experts_active_is_allowed(self, model: Model, gpu: GpuType, full_speed: Efficiency) -> None:
        dense = model.model_copy(update={"moe": MoE(experts=2, active=2, intermediate_size=1000)})
        assert stage_cost(dense, StageShape(gpu, 1, 4), full_speed, 0, True).touched(1) == pytest.approx(2)
