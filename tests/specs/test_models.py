"""The shipped models against published parameter counts, and config.json files good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hexgen2.specs import InputError, Model
from hexgen2.specs.catalog import load_model, model_names

# Counted in the published checkpoints (the index of safetensors files, or of PyTorch files for OPT).
PUBLISHED = {
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_723_412_480,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
}

# What one token is multiplied with, as the makers state it: all weights but the token table, in billions.
ACTIVE = {"qwen3-30b-a3b": 3.3, "mixtral-8x7b": 12.9, "deepseek-v2-lite": 2.4}

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN_MOE = {**LLAMA, **MOE, "model_type": "qwen3_moe"}
DEEPSEEK = {
    **{key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "model_type": "deepseek_v2",
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}
INT4 = {"num_bits": 4, "group_size": 128, "symmetric": True, "type": "int"}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def model_of(folder: Path, config: dict[str, Any]) -> Model:
    return load_model(str(write(folder, config)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_match_the_published_count(name: str) -> None:
    """Norms and biases are left out: under 0.1% of any of these."""
    ours = load_model(name).total_params
    assert ours == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert ours < PUBLISHED[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_match_the_makers_figure(name: str) -> None:
    model = load_model(name)
    active = sum(model.active_layer_params(layer) for layer in range(model.layers))
    assert (active + 2 * model.lm_head_params) / 1e9 == pytest.approx(ACTIVE[name], rel=0.12)


def test_every_model_of_the_contract_is_shipped() -> None:
    assert set(model_names()) == {*PUBLISHED, "tiny-llama"}
    for name in PUBLISHED:
        model = load_model(name)
        assert model.name == name
        assert model.location.count("/") == 1, "a hub id"
        assert load_model(model.location) is model


def test_the_shipped_tiny_model_is_a_directory_with_weights() -> None:
    model = load_model("tiny-llama")
    folder = Path(model.location)
    assert model.name == "tiny-llama"
    assert model.layers >= 8
    assert model.heads >= 8
    assert model.kv_heads >= 4
    weights = folder / "model.safetensors"
    assert weights.stat().st_size == pytest.approx(model.total_params * model.weight_bytes, rel=0.05)


def test_what_is_special_to_an_architecture() -> None:
    opt = load_model("opt-30b")
    assert (opt.gated_mlp, opt.tied_embeddings, opt.position_embeddings) == (False, True, 2050)
    assert opt.kv_heads == opt.heads == 56
    mixtral = load_model("mixtral-8x7b")
    assert mixtral.moe is not None
    assert (mixtral.moe.experts, mixtral.moe.active, mixtral.moe.dense_layers) == (8, 2, 0)
    deepseek = load_model("deepseek-v2-lite")
    assert deepseek.moe is not None
    assert (deepseek.moe.dense_layers, deepseek.moe.shared_intermediate_size) == (1, 2 * 1408)
    assert not deepseek.is_moe_layer(0)
    assert deepseek.is_moe_layer(1)
    assert deepseek.kv_bytes_per_token_layer == (512 + 64) * 2
    assert load_model("qwen3-32b").head_dim == 128, "not hidden_size / heads, which is 80"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_dense_architectures(tmp_path: Path, kind: str) -> None:
    model = model_of(tmp_path, {**LLAMA, "model_type": kind})
    assert model.name == tmp_path.name
    assert model.location == str(tmp_path)
    assert (model.layers, model.hidden_size, model.heads, model.kv_heads, model.head_dim) == (4, 64, 8, 2, 8)
    per_layer = 64 * (2 * 64 + 2 * 16) + 3 * 64 * 128
    assert model.total_params == 2 * 1000 * 64 + 4 * per_layer


def test_fields_that_a_config_may_leave_out(tmp_path: Path) -> None:
    short = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "torch_dtype")}
    model = model_of(tmp_path, short)
    assert model.kv_heads == 8
    assert model.weight_bytes == model.activation_bytes == 2
    assert not model.tied_embeddings


@pytest.mark.parametrize(
    ("field", "dtype", "size"),
    [("torch_dtype", "float32", 4), ("dtype", "float16", 2), ("dtype", "float32", 4)],
)
def test_dtype(tmp_path: Path, field: str, dtype: str, size: float) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    model = model_of(tmp_path, {**config, field: dtype})
    assert model.weight_bytes == model.kv_bytes == model.activation_bytes == size


def test_experts(tmp_path: Path) -> None:
    qwen = model_of(tmp_path, {**QWEN_MOE, "mlp_only_layers": [0]})
    assert qwen.moe is not None
    assert (qwen.moe.dense_layers, qwen.moe.experts, qwen.expert_params) == (1, 8, 3 * 64 * 32)
    deepseek = model_of(tmp_path, DEEPSEEK)
    assert deepseek.moe is not None
    assert deepseek.moe.shared_intermediate_size == 64
    assert deepseek.mla is not None
    assert deepseek.mla.q_lora_rank is None
    assert deepseek.kv_shards == 1


@pytest.mark.parametrize(
    ("section", "weight_bytes", "kv_bytes"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, 1, 2),
        ({"quant_method": "fbgemm_fp8"}, 1, 2),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128, 2),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 0.5 + 2.5 / 32, 2),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1, 2),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5 + 4 / 64, 2),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            0.5 + (1 + 4 / 256) / 64,
            2,
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1, 2),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": INT4}}},
            0.5 + 2 / 128,
            2,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            1,
            1,
        ),
    ],
)
def test_quantised_weights(
    tmp_path: Path, section: dict[str, Any], weight_bytes: float, kv_bytes: float
) -> None:
    model = model_of(tmp_path, {**LLAMA, "quantization_config": section})
    assert model.weight_bytes == pytest.approx(weight_bytes)
    assert model.kv_bytes == kv_bytes
    assert model.activation_bytes == 2


BAD = [
    # config, field, problem, mend
    ({}, "model_type", "is missing", "add it"),
    ({**LLAMA, "model_type": "mamba"}, "model_type", "unknown architecture 'mamba'", "llama, mistral, qwen2"),
    ({**LLAMA, "model_type": ["llama"]}, "model_type", "unknown architecture ['llama']", "use a model of"),
    ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size", "is missing", "add it"),
    ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers", "0 is not a whole number of", "published"),
    ({**LLAMA, "vocab_size": "32000"}, "vocab_size", "'32000' is not a whole number", "published"),
    ({**LLAMA, "vocab_size": True}, "vocab_size", "True is not a whole number", "published"),
    ({**LLAMA, "num_attention_heads": 7}, "head_dim", "is missing", "add it"),
    ({**LLAMA, "num_key_value_heads": 3}, "", "8 attention heads do not divide over 3 KV heads", "correct"),
    ({**LLAMA, "tie_word_embeddings": "yes"}, "tie_word_embeddings", "'yes' is not true or false", "true"),
    ({**LLAMA, "torch_dtype": "int3"}, "torch_dtype", "unknown dtype 'int3'", "bfloat16"),
    ({**LLAMA, "dtype": ["x"]}, "dtype", "unknown dtype ['x']", "bfloat16"),
    ({**QWEN_MOE, "num_experts_per_tok": 9}, "", "9 experts per token, but there are only 8", "correct"),
    ({**QWEN_MOE, "decoder_sparse_step": 2}, "decoder_sparse_step", "2 is not supported", "docs/catalog.md"),
    ({**LLAMA, "num_hidden_layers": 10**6}, "num_hidden_layers", "1000000 is more than 10,000", "published"),
    ({**LLAMA, "vocab_size": 10**10}, "vocab_size", "10000000000 is more than 1,000,000,000", "published"),
    ({**QWEN_MOE, "mlp_only_layers": 3}, "mlp_only_layers", "3 is not supported", "docs/catalog.md"),
    ({**QWEN_MOE, "mlp_only_layers": [2]}, "mlp_only_layers", "[2] is not supported", "docs/catalog.md"),
    ({**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq", "2 is not supported", "docs/catalog.md"),
    ({**DEEPSEEK, "kv_lora_rank": None}, "kv_lora_rank", "is missing", "add it"),
    (
        {**LLAMA, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
        "word_embed_proj_dim",
        "32 is not supported",
        "docs/catalog.md",
    ),
    ({**LLAMA, "quantization_config": 4}, "quantization_config", "is not an object", "publisher"),
    (
        {**LLAMA, "quantization_config": {"quant_method": "mxfp4"}},
        "quantization_config.quant_method",
        "unknown method 'mxfp4'",
        "fp8, fbgemm_fp8, awq, gptq",
    ),
    (
        {**LLAMA, "quantization_config": {"quant_method": "awq"}},
        "quantization_config.bits",
        "is missing",
        "publisher",
    ),
    (
        {**LLAMA, "quantization_config": {"quant_method": "awq", "bits": -4}},
        "quantization_config.bits",
        "-4 is not a whole number",
        "publisher",
    ),
    (
        {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}},
        "quantization_config",
        "has neither load_in_4bit nor load_in_8bit",
        "set the one",
    ),
    (
        {**LLAMA, "quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        "quantization_config.config_groups",
        "is missing or empty",
        "publisher",
    ),
    (
        {**LLAMA, "quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {}}}},
        "quantization_config.config_groups.g.weights",
        "is missing",
        "publisher",
    ),
]


@pytest.mark.parametrize(("config", "field", "problem", "mend"), BAD)
def test_a_bad_config_is_told_in_one_line(
    tmp_path: Path, config: dict[str, Any], field: str, problem: str, mend: str
) -> None:
    with pytest.raises(InputError) as caught:
        model_of(tmp_path, config)
    line = str(caught.value)
    source = tmp_path / "config.json"
    assert line.startswith(f"{source}: {field}: {problem}" if field else f"{source}: {problem}")
    assert mend in line.split("; ", 1)[1]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model: unknown model 'gpt-5'; use one of opt-13b, .* config\.json"):
        load_model("gpt-5")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": ', encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json: line 1: is not whole JSON"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match=r"config\.json' is a file"):
        load_model(str(tmp_path / "config.json"))
