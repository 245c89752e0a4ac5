"""The closed forms of goodput against the simulator; benchmarks/queueing.py has more of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hexgen2.cost import CostModel
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    place = Path(__file__).parents[2] / "benchmarks" / "queueing.py"
    spec = importlib.util.spec_from_file_location("queueing_benchmark", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("role", "gpu", "tp", "stages", "model", "workload", "ttft_s", "tpot_s"),
    [
        ("prefill", "H100-80G-SXM", 4, 1, "llama-2-70b", "hphd", 1.0, 0.2),
        ("prefill", "A100-80G-PCIe", 4, 2, "llama-2-70b", "lpld", 2.0, 0.2),
        ("decode", "L40", 2, 1, "llama-2-13b", "hphd", 2.0, 0.05),
        ("colocated", "H100-80G-SXM", 4, 1, "llama-2-70b", "hphd", 1.0, 0.05),
        ("colocated", "L40", 2, 1, "llama-2-13b", "lpld", 0.5, 0.05),
    ],
)
def test_predicted_rates_are_those_of_the_simulator(
    benchmark: ModuleType,
    role: str,
    gpu: str,
    tp: int,
    stages: int,
    model: str,
    workload: str,
    ttft_s: float,
    tpot_s: float,
) -> None:
    case = benchmark.Case(role, gpu, tp, stages, model, workload, ttft_s, tpot_s)
    cost = CostModel(load_model(model))
    layout = benchmark.layout_of(case, cost.model.layers)
    rate, throughput, batch = benchmark.predicted(
        case, cost, layout, load_workload(workload).representative(256)
    )
    measured = benchmark.highest_rate(case, cost, layout, batch, throughput, 1500)
    assert 0 < rate <= throughput
    assert rate == pytest.approx(measured, rel=0.2)
