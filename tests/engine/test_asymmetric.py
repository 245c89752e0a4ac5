"""Engines whose stages differ in TP answer with the tokens of one TP1/PP1 engine (float32, greedy).

On two cores an engine of [2, 1] is ready after 18 s, and answers the five prompts in 4 to 6 s at first and in
1 to 2 s then. With the cores shared (a load of 10 to 20) a case took 25 to 40 s for 3 ranks, 55 to 70 s for 4
and 120 s for 5. The ordinary set starts three engines, the slow one eight more and the reference.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.asymmetric_engines import CHUNKED, SERVER, WHOLE, engine, greedy, one_ranks_tokens, tiny_llama

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODES = {"chunked": CHUNKED, "whole": WHOLE}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "layout",
    [
        "2x5+1x3",
        pytest.param("1x3+2x5", marks=pytest.mark.slow),
        pytest.param("2x4+1x1+1x3", marks=pytest.mark.slow),
        pytest.param("1x2+2x5+1x1", marks=pytest.mark.slow),
        pytest.param("1x3+4x5", marks=pytest.mark.slow),
    ],
)
def test_tokens_equal_one_ranks(layout: str, mode: str, tmp_path: Path) -> None:
    expected = one_ranks_tokens()  # before the group starts: two cores are few
    with engine((*SERVER, "--layout", layout), tiny_llama(), tmp_path / "log", *MODES[mode]) as group:
        group.wait_ready()
        assert greedy(group) == expected
