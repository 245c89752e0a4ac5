"""fp8 KV caches over the connector, between real engines: a byte an element."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.asymmetric_engines import LENGTHS, PLAIN, TOKENS, engine, greedy, tiny_llama
from tests.vllm_plugin.kv_connector.engines import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    all_two_legs,
    engines,
    received,
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


def test_fp8_caches_give_the_tokens_of_one_engine(tmp_path: Path) -> None:
    with engine(PLAIN, tiny_llama(), tmp_path / "alone", *FP8) as alone:
        alone.wait_ready()
        expected = greedy(alone)
    with engines(tmp_path, {"p": "tp1", "d": "tp1"}, *FP8) as pair:
        assert all_two_legs(pair["p"], pair["d"], TOKENS) == expected
        blocks = sum(-(-(length - 1) // BLOCK_TOKENS) for length in LENGTHS)
        assert received(pair["d"], "p") == blocks * BLOCK_BYTES / FLOAT32
        for running in pair.values():
            wait_idle(running)
