"""fp8 KV caches over the connector, between real engines: a byte an element, whole blocks and parts of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.engine.asymmetric_engines import LENGTHS, PLAIN, TOKENS, engine, greedy, tiny_llama
from tests.vllm_plugin.kv_connector.engines import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    all_two_legs,
    engines,
    leg_one,
    leg_two,
    received,
    token_ids,
    wait_idle,
)

FLOAT32 = 4
FP8 = ("--kv-cache-dtype", "fp8", "--block-size", str(BLOCK_TOKENS))


def has_avx512() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512f" in flags.read_text(errors="replace")


pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not has_avx512(), reason="vLLM keeps fp8 caches on CPUs with AVX-512 alone"),
]


@pytest.mark.parametrize(("prefill", "decode"), [("tp1", "tp1"), ("tp2", "tp1")])
def test_fp8_caches_give_the_tokens_of_one_engine(prefill: str, decode: str, tmp_path: Path) -> None:
    with engine(PLAIN, tiny_llama(), tmp_path / "alone", *FP8) as alone:
        alone.wait_ready()
        expected = greedy(alone)
    with engines(tmp_path, {"p": prefill, "d": decode}, *FP8) as pair:
        assert all_two_legs(pair["p"], pair["d"], TOKENS) == expected
        blocks = sum(-(-(length - 1) // BLOCK_TOKENS) for length in LENGTHS)
        assert received(pair["d"], "p") == blocks * BLOCK_BYTES / FLOAT32
        for running in pair.values():
            wait_idle(running)


def test_caches_of_unlike_types_are_refused(tmp_path: Path) -> None:
    dice = random.Random(1)
    prompt = [dice.randrange(8, 2048) for _ in range(200)]
    with (
        engines(tmp_path, {"p": "tp1"}, *FP8) as quarter,
        engines(tmp_path, {"d": "tp1"}, "--block-size", str(BLOCK_TOKENS), policy={"d": "recompute"}) as whole,
    ):
        answer = leg_two(whole["d"], prompt, leg_one(quarter["p"], prompt), 8)
        assert token_ids(answer) == token_ids(leg_two(whole["d"], prompt, {}, 8))
        assert received(whole["d"], "p") == 0
        assert "another model or KV cache type" in whole["d"].tail()
