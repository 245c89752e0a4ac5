"""DistServe's published point (docs/simulator.md) within 20%: cost model and simulator together."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "distserve.py"))


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_the_published_rate_is_reproduced(script: dict[str, Any], sigma: float) -> None:
    plan, cost = script["disaggregated"](*script["PUBLISHED_LAYOUT"]), script["cost_model"]()
    published = script["PUBLISHED_RPS_PER_GPU"] * 3
    assert script["meets_targets"](plan, cost, sigma, 0.8 * published, 3000)
    assert not script["meets_targets"](plan, cost, sigma, 1.2 * published, 3000)


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_lengths_have_the_published_means(script: dict[str, Any], sigma: float) -> None:
    lengths = script["sharegpt"](20_000, sigma, np.random.default_rng(1))
    assert lengths.inputs.mean() == pytest.approx(script["MEAN_INPUT"], rel=0.01)
    # Long prompts leave less than some answers want of the context.
    assert 0.85 * script["MEAN_OUTPUT"] < lengths.outputs.mean() <= script["MEAN_OUTPUT"]
    assert (lengths.inputs + lengths.outputs).max() <= script["LONGEST"]
