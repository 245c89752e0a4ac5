"""The catalog's models against the weights that their makers publish."""

from __future__ import annotations

import pytest

from hexgen2.cost import CostModel, StageShape
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model

# Parameters as counted in the published safetensors (or PyTorch) files.
PUBLISHED = {
    "opt-13b": 12.853e9,
    "opt-30b": 29.975e9,
    "opt-66b": 65.718e9,
    "llama-2-7b": 6.738e9,
    "llama-2-13b": 13.016e9,
    "llama-2-70b": 68.977e9,
    "llama-3.1-8b": 8.030e9,
    "llama-3.1-70b": 70.554e9,
    "llama-3.1-405b": 405.853e9,
    "qwen3-32b": 32.762e9,
    "qwen3-30b-a3b": 30.532e9,
    "mixtral-8x7b": 46.703e9,
    "deepseek-v2-lite": 15.706e9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    assert load_model(name).total_params == pytest.approx(PUBLISHED[name], rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ranks_of_a_layout_hold_at_least_the_whole_model(name: str) -> None:
    model = load_model(name)
    gpu = gpu_type("H100-80G-SXM")
    first = model.layers // 3
    layout = (StageShape(gpu, 4, first, gpu.link), StageShape(gpu, 2, model.layers - first, gpu.link, gpu.link))
    weights = CostModel(model).weight_bytes(layout)
    held = 4 * weights[0] + 2 * weights[1]
    assert 1.0 <= held / (model.total_params * model.weight_bytes) < 1.06


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("llama-2-70b", 80 * 2 * 8 * 128 * 2),
        ("opt-30b", 48 * 2 * 7168 * 2),
        ("deepseek-v2-lite", 27 * 576 * 2),
    ],
)
def test_kv_bytes_per_token(name: str, kv_bytes: int) -> None:
    assert load_model(name).kv_bytes_per_token == kv_bytes


def test_plausible_figures_of_a_current_engine() -> None:
    """Llama-3.1-8B on one H100: vLLM gives about 6-8 ms per token alone and 25-45 thousand prompt tokens/s."""
    gpu = gpu_type("H100-80G-SXM")
    cost = CostModel(load_model("llama-3.1-8b"))
    layout = (StageShape(gpu, 1, 32),)
    assert 5.5e-3 < cost.decode_step_seconds(layout, 1, 500) < 8.5e-3
    assert 25e3 < 8192 / cost.prefill_seconds(layout, [1024] * 8) < 45e3
    assert 350e3 < cost.max_kv_tokens(layout) < 480e3


def test_plausible_figures_of_the_local_test_bed() -> None:
    """The shipped tiny model on one CPU core: some milliseconds a step, most of it overhead."""
    model = load_model("tiny-llama")
    gpu = gpu_type("cpu-1c")
    seconds = CostModel(model).decode_step_seconds((StageShape(gpu, 1, model.layers),), 4, 400)
    assert 1e-3 < seconds < 10e-3
