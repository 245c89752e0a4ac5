"""Memory, against an independent computation weight by weight."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.cost import CostModel, Settings, StageShape
from hexgen2.cost.memory import memory, stage_weight_bytes, workspace_bytes
from hexgen2.specs import GIB, MLA, GpuType, Model, MoE


def rank_weights(model: Model, layers: range, tp: int, *, first: bool, last: bool) -> float:
    """Bytes of the fullest rank, matrix by matrix as (rows, columns, how many ranks share it)."""
    h, d = model.hidden_size, model.head_dim
    total = 0.0
    for layer in layers:
        if model.mla is None:
            total += h * d * math.ceil(model.heads / tp)  # queries
            total += 2 * h * d * math.ceil(model.kv_heads / min(tp, model.kv_heads))  # keys and values
            total += d * math.ceil(model.heads / tp) * h  # output
        else:
            m, heads = model.mla, math.ceil(model.heads / tp)
            query = heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
            total += h * query if m.q_lora_rank is None else h * m.q_lora_rank + m.q_lora_rank * query
            total += h * (m.kv_lora_rank + m.qk_rope_head_dim)
            total += m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
            total += heads * m.v_head_dim * h
        matrices = 3 if model.gated_mlp else 2
        if model.is_moe_layer(layer):
            assert model.moe is not None
            for _ in range(model.moe.experts):
                total += matrices * h * model.moe.intermediate_size / tp
            total += matrices * h * model.moe.shared_intermediate_size / tp
            total += h * model.moe.experts
        else:
            total += matrices * h * model.intermediate_size / tp
    size = total * model.weight_bytes
    table = model.vocab_size / tp * h * max(model.weight_bytes, model.activation_bytes)
    if first:
        size += table + model.position_embeddings * h * model.activation_bytes
    if last and not (first and model.tied_embeddings):
        size += table
    return size


VARIANTS = {
    "dense": {},
    "tied": {"tied_embeddings": True},
    "opt": {"position_embeddings": 2050, "gated_mlp": False},
    "quantised": {"weight_bytes": 0.5625, "kv_bytes": 1.0},
    "moe": {"moe": MoE(experts=8, active=2, intermediate_size=700, dense_layers=1)},
    "shared": {"moe": MoE(experts=4, active=1, intermediate_size=500, shared_intermediate_size=300)},
    "mla": {"mla": MLA(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)},
    "mla-q": {
        "mla": MLA(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=600)
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("split", [(4,), (3, 1), (1, 2, 1)])
def test_weights(model: Model, gpu: GpuType, variant: str, tp: int, split: tuple[int, ...]) -> None:
    model = model.model_copy(update=VARIANTS[variant])
    layout = tuple(StageShape(gpu, tp, layers) for layers in split)
    found = CostModel(model).weight_bytes(layout)
    start = 0
    for place, layers in enumerate(split):
        expected = rank_weights(
            model, range(start, start + layers), tp, first=place == 0, last=place == len(split) - 1
        )
        assert found[place] == pytest.approx(expected)
        start += layers


@pytest.mark.parametrize("variant", ["dense", "opt", "moe", "shared", "mla"])
def test_one_gpu_holds_all_weights(model: Model, gpu: GpuType, variant: str) -> None:
    model = model.model_copy(update=VARIANTS[variant])
    assert CostModel(model).weight_bytes((StageShape(gpu, 1, 4),)) == (2.0 * model.total_params,)


def test_workspace(model: Model, gpu: GpuType) -> None:
    # 1000 tokens · 2 bytes · (2·1000 + 3·2000/2); logits of 8 sequences over 10 000 tokens: 2 + 4 bytes each.
    settings = Settings(token_budget=1000, max_batch=8)
    stage = StageShape(gpu, 2, 4, gpu.link)
    assert workspace_bytes(model, stage, settings, last=False) == 1000 * 2 * 5000
    assert workspace_bytes(model, stage, settings, last=True) == 1000 * 2 * 5000 + 8 * 10_000 * 6


def test_kv_tokens_are_the_minimum_over_the_stages(exact: CostModel, model: Model, gpu: GpuType) -> None:
    small = gpu.model_copy(update={"name": "small", "memory_bytes": 1 * GIB})
    layout = (StageShape(gpu, 1, 2), StageShape(small, 2, 2, gpu.link))
    free = exact.free_kv_bytes(layout)
    weights = exact.weight_bytes(layout)
    assert free[0] == pytest.approx(
        0.9 * 10 * GIB - weights[0] - workspace_bytes(model, layout[0], exact.settings, last=False)
    )
    per_token = (2 * 2000, 2 * 2000 / 2)
    tokens = [size / each for size, each in zip(free, per_token, strict=True)]
    assert exact.max_kv_tokens(layout) == min(int(count // 16) for count in tokens) * 16


@pytest.mark.parametrize(("tp", "share"), [(1, 1), (2, 0.5), (3, 0.5), (4, 0.25), (8, 0.25)])
def test_kv_is_split_by_whole_heads_and_no_further(
    exact: CostModel, model: Model, gpu: GpuType, tp: int, share: float
) -> None:
    sizes = memory(model, (StageShape(gpu, tp, 4, gpu.link),), exact.settings)
    assert sizes.per_token == (4 * 2000 * share,)


def test_mla_keeps_the_whole_latent_on_every_rank(model: Model, gpu: GpuType) -> None:
    model = model.model_copy(update=VARIANTS["mla"])
    for tp in (1, 2, 4):
        sizes = memory(model, (StageShape(gpu, tp, 4, gpu.link),), Settings())
        assert sizes.per_token == (4 * 576 * 2.0,)


def test_weights_that_do_not_fit_leave_no_tokens_and_the_lack_is_told(model: Model, gpu: GpuType) -> None:
    tiny = gpu.model_copy(update={"memory_bytes": 0.05 * GIB})
    settings = Settings(token_budget=16, max_batch=1, runtime_bytes=0.0)
    cost = CostModel(model, settings=settings)
    layout = (StageShape(tiny, 1, 4),)
    assert cost.max_kv_tokens(layout) == 0
    used = cost.weight_bytes(layout)[0] + workspace_bytes(model, layout[0], settings, last=True)
    assert cost.missing_bytes(layout, 16) == pytest.approx(used + 16 * 4 * 2000 - 0.9 * tiny.memory_bytes)
    # With exactly that much more memory on the GPU one block fits.
    roomy = tiny.model_copy(
        update={"memory_bytes": tiny.memory_bytes + (cost.missing_bytes(layout, 16) + 1) / 0.9}
    )
    assert cost.max_kv_tokens((StageShape(roomy, 1, 4),)) == 16
    assert cost.missing_bytes((StageShape(roomy, 1, 4),), 16) == 0


def test_a_cpu_has_no_runtime_overhead(model: Model, gpu: GpuType) -> None:
    cpu = gpu.model_copy(update={"name": "cpu", "vendor": "cpu"})
    cost = CostModel(model)
    single, pair = ((StageShape(cpu, tp, 4, gpu.link),) for tp in (1, 2))
    on_gpu = tuple((StageShape(gpu, tp, 4, gpu.link),) for tp in (1, 2))
    assert cost.free_kv_bytes(single)[0] - cost.free_kv_bytes(on_gpu[0])[0] == pytest.approx(1.0 * GIB)
    assert cost.free_kv_bytes(pair)[0] - cost.free_kv_bytes(on_gpu[1])[0] == pytest.approx(1.5 * GIB)


@given(tp=st.integers(1, 7), variant=st.sampled_from(sorted(VARIANTS)), first=st.booleans(), last=st.booleans())
def test_more_tensor_parallelism_never_needs_more_memory(
    tp: int, variant: str, first: bool, last: bool
) -> None:
    model = _model().model_copy(update=VARIANTS[variant])
    sizes = [
        stage_weight_bytes(model, StageShape(_gpu(), t, 4), 0, first=first, last=last)
        + workspace_bytes(model, StageShape(_gpu(), t, 4), Settings(), last=last)
        for t in (tp, tp + 1)
    ]
    assert sizes[1] <= sizes[0]
    tokens = [memory(model, (StageShape(_gpu(), t, 4),), Settings()).per_token[0] for t in (tp, tp + 1)]
    assert tokens[1] <= tokens[0]


def _model() -> Model:
    return Model(
        name="m",
        layers=4,
        hidden_size=1000,
        heads=8,
        kv_heads=4,
        head_dim=125,
        intermediate_size=2000,
        vocab_size=10000,
        max_positions=4096,
    )


def _gpu() -> GpuType:
    from hexgen2.specs.catalog import gpu_type

    return gpu_type("A100-80G-SXM")
