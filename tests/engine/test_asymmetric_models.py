"""Layouts on other kinds of models: norms on queries and keys, a mixture of experts, latent attention.

Each case starts two engines: 1 to 3 minutes on two busy cores. Prompts are sent one after the other, since
vLLM's latent attention on CPU answers differently from run to run where they share a batch. There, too, vLLM's
own engine of TP 2 differs from its engine of TP 1, so latent attention is compared over stages of TP 1 only.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.asymmetric_engines import PLAIN, SERVER, WHOLE, engine, greedy
from tests.engine.asymmetric_models import write_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("kind", "layout"), [("qwen3", "2x5+1x3"), ("mixtral", "2x5+1x3"), ("deepseek-v2", "1x5+1x3")]
)
def test_tokens_equal_one_ranks(kind: str, layout: str, tmp_path: Path) -> None:
    model = write_model(kind, tmp_path / "model")
    arguments = (*WHOLE, "--skip-tokenizer-init")
    with engine(PLAIN, model, tmp_path / "alone", *arguments) as alone:
        alone.wait_ready()
        expected = greedy(alone, at_once=1)
    with engine((*SERVER, "--layout", layout), model, tmp_path / "group", *arguments) as group:
        group.wait_ready()
        assert greedy(group, at_once=1) == expected
