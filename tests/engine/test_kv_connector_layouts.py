"""The KV connector between real engines of unlike layouts, against the tokens of one engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.asymmetric_engines import CHUNKED, LENGTHS, PLAIN, TOKENS, WHOLE, engine, greedy, tiny_llama
from tests.vllm_plugin.kv_connector.engines import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    all_two_legs,
    engines,
    received,
    wait_idle,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PAIRS = [
    ("tp1", "tp1", CHUNKED),
    ("tp2", "tp1", WHOLE),
    ("tp1", "tp2", CHUNKED),
    ("pp2", "tp1", WHOLE),
    ("tp1", "pp2", CHUNKED),
    ("2x5+1x3", "1x3+2x5", WHOLE),
    ("2x5+1x3", "1x3+2x5", CHUNKED),
    ("2x5+1x3", "tp1", CHUNKED),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one TP1/PP1 engine without a connector continues the prompts with."""
    with engine(PLAIN, tiny_llama(), tmp_path_factory.mktemp("one") / "one.log") as one:
        one.wait_ready()
        return greedy(one)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("prefill", "decode", "mode"), PAIRS)
def test_any_pair_of_layouts_gives_the_tokens_of_one_engine(
    prefill: str, decode: str, mode: tuple[str, ...], expected: list[list[int]], tmp_path: Path
) -> None:
    with engines(tmp_path, {"p": prefill, "d": decode}, *mode, "--block-size", str(BLOCK_TOKENS)) as pair:
        assert all_two_legs(pair["p"], pair["d"], TOKENS) == expected
        blocks = sum(-(-(length - 1) // BLOCK_TOKENS) for length in LENGTHS)
        assert received(pair["d"], "p") == blocks * BLOCK_BYTES
        for running in pair.values():
            wait_idle(running)
