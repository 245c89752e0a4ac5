"""Layouts on other kinds of models: norms on queries and keys, a mixture of experts, latent attention.

Each case starts two engines: 1 to 4 minutes on two busy cores.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.asymmetric_engines import PLAIN, SERVER, WHOLE, engine, greedy
from tests.engine.asymmetric_models import CONFIGS, write_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_equal_one_ranks(kind: str, tmp_path: Path) -> None:
    model = write_model(kind, tmp_path / "model")
    arguments = (*WHOLE, "--skip-tokenizer-init")
    with engine(PLAIN, model, tmp_path / "alone", *arguments) as alone:
        alone.wait_ready()
        expected = greedy(alone)
    with engine((*SERVER, "--layout", "2x5+1x3"), model, tmp_path / "group", *arguments) as group:
        group.wait_ready()
        assert greedy(group) == expected
