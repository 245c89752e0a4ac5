"""The shipped folder: size, shape, and weights that agree with the config. Needs no torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

MEGABYTE = 1_000_000
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def config(tiny_llama: Path) -> dict[str, Any]:
    return read_json(tiny_llama / "config.json")


@pytest.fixture(scope="module")
def tensors(tiny_llama: Path) -> dict[str, Any]:
    """The safetensors header: name -> {dtype, shape, data_offsets}."""
    with (tiny_llama / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def expected_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Every tensor of a Llama with tied embeddings, from the config alone."""
    hidden, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": [queries, hidden],
            prefix + "self_attn.k_proj.weight": [keys, hidden],
            prefix + "self_attn.v_proj.weight": [keys, hidden],
            prefix + "self_attn.o_proj.weight": [hidden, queries],
            prefix + "mlp.gate_proj.weight": [mlp, hidden],
            prefix + "mlp.up_proj.weight": [mlp, hidden],
            prefix + "mlp.down_proj.weight": [hidden, mlp],
            prefix + "input_layernorm.weight": [hidden],
            prefix + "post_attention_layernorm.weight": [hidden],
        }
    return shapes


def test_the_folder_holds_these_files_in_four_megabytes(tiny_llama: Path) -> None:
    files = {path.name: path.stat().st_size for path in tiny_llama.iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= 4 * MEGABYTE


@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("num_hidden_layers", 8),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("max_position_embeddings", 1024),
    ],
)
def test_the_config_meets_the_minimum(config: dict[str, Any], key: str, least: int) -> None:
    assert config[key] >= least


def test_the_config_is_a_llama_with_a_head_size_that_vllm_supports(config: dict[str, Any]) -> None:
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["head_dim"] in (32, 64, 96, 128)
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "key", ["num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"]
)
def test_tensor_parallelism_divides_the_model(config: dict[str, Any], key: str, tp: int) -> None:
    assert config[key] % tp == 0


def test_the_weights_have_the_shapes_of_the_config(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    assert {name: entry["shape"] for name, entry in tensors.items()} == expected_shapes(config)
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert config["torch_dtype"] == "bfloat16"


def test_the_weights_file_is_complete(tiny_llama: Path, tensors: dict[str, Any]) -> None:
    path = tiny_llama / "model.safetensors"
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size == 8 + header + max(entry["data_offsets"][1] for entry in tensors.values())


def test_the_special_tokens_agree_between_the_files(tiny_llama: Path, config: dict[str, Any]) -> None:
    ids = {t["content"]: t["id"] for t in read_json(tiny_llama / "tokenizer.json")["added_tokens"]}
    named = read_json(tiny_llama / "tokenizer_config.json")
    generation = read_json(tiny_llama / "generation_config.json")
    for role in ("bos", "eos", "pad"):
        assert config[f"{role}_token_id"] == generation[f"{role}_token_id"] == ids[named[f"{role}_token"]]


def test_the_vocabulary_fills_the_embedding(tiny_llama: Path, config: dict[str, Any]) -> None:
    vocabulary = read_json(tiny_llama / "tokenizer.json")["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))


def test_the_card_is_filled_in_and_names_the_licence(tiny_llama: Path) -> None:
    card = (tiny_llama / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "{{" not in card
    assert "tools/tiny_llama/build.py" in card
