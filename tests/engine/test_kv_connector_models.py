"""The KV connector on other kinds of models: a mixture of experts, latent attention.

Prompts are sent one after the other: vLLM's latent attention on CPU answers differently from run to run where
they share a batch. That kernel cannot go on from a cache that it has not filled itself either, whatever brought
the cache; so there the reference is vLLM's own NIXL connector, and `deploy` refuses such plans.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.asymmetric_engines import LENGTHS, PLAIN, TOKENS, WHOLE, engine, free_port, greedy
from tests.engine.asymmetric_models import LAYERS, write_model
from tests.vllm_plugin.kv_connector.engines import all_two_legs, engines, received, wait_idle

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

FLOAT32 = 4
WITHOUT_TEXT = (*WHOLE, "--skip-tokenizer-init")


def ours(
    model: Path, folder: Path, prefill: str, decode: str, block_tokens: int, token_layer_bytes: int
) -> list[list[int]]:
    """The tokens over our connector; checks the bytes that it moved, and that no block stays behind."""
    arguments = (*WITHOUT_TEXT, "--block-size", str(block_tokens))
    with engines(folder, {"p": prefill, "d": decode}, *arguments, model=model) as pair:
        tokens = all_two_legs(pair["p"], pair["d"], TOKENS, at_once=1)
        blocks = sum(-(-(length - 1) // block_tokens) for length in LENGTHS)
        assert received(pair["d"], "p") == blocks * block_tokens * LAYERS * token_layer_bytes
        for running in pair.values():
            wait_idle(running)
        return tokens


def test_a_mixture_of_experts_gives_the_tokens_of_one_engine(tmp_path: Path) -> None:
    model = write_model("mixtral", tmp_path / "model")
    with engine(PLAIN, model, tmp_path / "alone", *WITHOUT_TEXT) as alone:
        alone.wait_ready()
        expected = greedy(alone, at_once=1)
    keys_and_values = 2 * 4 * 32 * FLOAT32  # KV heads x head size
    assert ours(model, tmp_path, "2x5+1x3", "tp1", 32, keys_and_values) == expected


def test_latent_attention_gives_the_tokens_of_vllm_s_own_connector(tmp_path: Path) -> None:
    model = write_model("deepseek-v2", tmp_path / "model")
    started = []
    for name, role in (("p", "kv_producer"), ("d", "kv_consumer")):
        config = {"kv_connector": "NixlConnector", "kv_role": role, "engine_id": name}
        arguments = (*WITHOUT_TEXT, "--block-size", "16", "--kv-transfer-config", json.dumps(config))
        channel = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        started.append(engine(PLAIN, model, tmp_path / f"nixl-{name}", *arguments, **channel))
    with started[0] as prefill, started[1] as decode:
        prefill.wait_ready()
        decode.wait_ready()
        expected = all_two_legs(prefill, decode, TOKENS, at_once=1)
    latent_and_rotary = (512 + 64) * FLOAT32
    assert ours(model, tmp_path, "tp1", "1x5+1x3", 16, latent_and_rotary) == expected
