"""The default efficiencies against measured times of Llama-2-70B on A100 and H100.

The table is of a 2023 engine with large fixed overheads (about 43 ms a decode step on an A100 whatever the TP),
the defaults are for a current one: this holds the order of magnitude and the direction of the difference, no
more. The fit on the table (the profile `splitwise-2023`) is checked elsewhere.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from hexgen2.cost import CostModel, StageShape
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model

TABLE = Path(__file__).parents[3] / "shared" / "data" / "measured_llama2_70b_a100_h100.csv"
TYPES = {"a100-80gb": "A100-80G-SXM", "h100-80gb": "H100-80G-SXM"}
Ratios = dict[tuple[str, int], list[float]]


@pytest.fixture(scope="module")
def ratios() -> dict[str, Ratios]:
    """Predicted / measured by phase and (hardware, TP), one for each measured point (median of its runs)."""
    if not TABLE.exists():
        pytest.skip(f"needs {TABLE.name} in ../shared/data")
    points: dict[tuple[str, int, int, int, int], list[tuple[float, float]]] = defaultdict(list)
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            tp, batch = int(row["tensor_parallel"]), int(row["batch_size"])
            if (tp, batch) == (2, 64):
                continue  # impossible rows: faster than a batch of 8, so the batch was cut
            key = (row["hardware"], tp, int(row["prompt_size"]), batch, int(row["token_size"]))
            points[key].append((float(row["prompt_time"]) / 1e3, float(row["token_time"]) / 1e3))
    cost = CostModel(load_model("llama-2-70b"))
    found: dict[str, Ratios] = {"prefill": defaultdict(list), "decode": defaultdict(list)}
    for (hardware, tp, prompt, batch, answer), times in points.items():
        gpu = gpu_type(TYPES[hardware])
        layout = (StageShape(gpu, tp, 80, gpu.link),)
        prefill = statistics.median(time for time, _ in times)
        step = statistics.median(time for _, time in times)
        context = batch * (prompt + answer / 2)
        found["prefill"][hardware, tp].append(cost.prefill_seconds(layout, [prompt] * batch) / prefill)
        found["decode"][hardware, tp].append(cost.decode_step_seconds(layout, batch, context) / step)
    return found


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("hardware", TYPES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_current_engine_is_faster_but_not_by_an_order(
    ratios: dict[str, Ratios], phase: str, hardware: str, tp: int
) -> None:
    median = statistics.median(ratios[phase][hardware, tp])
    assert 0.3 < median < 1.1
