"""The measured times of Llama-2-70B that splitwise-sim publishes, and how the profile `splitwise-2023` is
fitted on them.

The table (data/perf_model.csv of Mutinifni/splitwise-sim, MIT) has five runs or more of each point: the time of
a batch's prompts and the mean time of an output token, in milliseconds, on 2, 4 and 8 A100-80GB and H100-80GB.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hexgen2.calibrate.fit import Fit, Measured, errors_of, fit
from hexgen2.cost import Efficiency, StageShape, default_efficiency
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GpuType

GPUS: Mapping[str, str] = {"a100-80gb": "A100-80G-SXM", "h100-80gb": "H100-80G-SXM"}
MODEL = "llama-2-70b"

IMPOSSIBLE = {(2, 64): "faster than a batch of 8: the batch was cut"}
"""(TP, batch size) of rows that are left out, and why."""

FREE = (
    "compute",
    "attention",
    "memory",
    "kv",
    "link",
    "large_link",
    "large_message_bytes",
    "step_overhead_s",
    "layer_launch_s",
    "prompt_overhead_s",
    "sequence_overhead_s",
)


def read(path: Path) -> dict[str, list[Measured]]:
    """The table's points by GPU type, each the median of its runs; impossible rows are left out.

    A decode point's context is the mean over the answer: the prompt and half the tokens generated. Prefill does
    not depend on the answer's length, so such points are one.
    """
    model = load_model(MODEL)
    runs: dict[tuple[str, str, int, int, float], list[float]] = defaultdict(list)
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                tp, batch = int(row["tensor_parallel"]), int(row["batch_size"])
                if (tp, batch) in IMPOSSIBLE:
                    continue
                prompt, answer = int(row["prompt_size"]), int(row["token_size"])
                gpu = GPUS[row["hardware"]]
                runs[gpu, "prefill", tp, batch, prompt].append(float(row["prompt_time"]) / 1e3)
                runs[gpu, "decode", tp, batch, prompt + answer / 2].append(float(row["token_time"]) / 1e3)
    except OSError as error:
        raise InputError(str(path), "", f"cannot be read ({error.strerror})", "give the table's path") from None
    except (KeyError, ValueError) as error:
        raise InputError(
            str(path), "", f"is not the table ({error})", "give splitwise-sim's perf_model.csv"
        ) from None
    points: dict[str, list[Measured]] = defaultdict(list)
    for (name, phase, tp, batch, tokens), seconds in runs.items():
        gpu_found = gpu_type(name)
        layout = (StageShape(gpu_found, tp, model.layers, gpu_found.link),)
        points[name].append(
            Measured(
                model,
                "prefill" if phase == "prefill" else "decode",
                layout,
                batch,
                tokens,
                statistics.median(seconds),
            )
        )
    return dict(points)


def start(gpu: GpuType) -> Efficiency:
    """Where the fit begins: a 2023 engine without CUDA graphs.

    Weights at 0.68 of the memory bandwidth: what gpt-fast, of the same year, reached on A100s (1,397 GB/s of
    2,039 with a 7B model on one GPU; its README). The host's 0.4 ms per layer and the rest are orders of
    magnitude, which the measurements settle.
    """
    return default_efficiency(gpu).model_copy(
        update={
            "compute": 0.6,
            "attention": 0.5,
            "memory": 0.68,
            "kv": 0.7,
            "link": 0.7,
            "large_link": 0.15,
            "large_message_bytes": 32 * 2.0**20,
            "layer_overhead_s": 8e-6,
            "step_overhead_s": 2e-3,
            "layer_launch_s": 4e-4,
            "prompt_overhead_s": 1e-2,
            "sequence_overhead_s": 1e-4,
            "reduce_hops": None,
        }
    )


def fit_gpu(name: str, points: Sequence[Measured]) -> Fit:
    """The fit of one GPU type on these points."""
    return fit(name, points, start(gpu_type(name)), FREE)


def median_errors(points: Sequence[Measured], errors: Sequence[float]) -> dict[tuple[str, int], float]:
    """Median of the absolute errors by (phase, TP)."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for point, error in zip(points, errors, strict=True):
        found[point.phase, point.layout[0].tp].append(abs(error))
    return {key: float(np.median(values)) for key, values in found.items()}


def cross_validated(name: str, points: Sequence[Measured]) -> dict[tuple[str, int], float]:
    """Median absolute error by (phase, TP) of a fit on the other TPs alone."""
    found: dict[tuple[str, int], float] = {}
    for tp in sorted({point.layout[0].tp for point in points}):
        others = [point for point in points if point.layout[0].tp != tp]
        left_out = [point for point in points if point.layout[0].tp == tp]
        predicted = fit_gpu(name, others)
        found |= median_errors(left_out, errors_of(name, left_out, predicted.efficiency))
    return found
