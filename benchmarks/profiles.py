"""Fit the shipped profiles, and say how far the cost model is from what they were fitted on.

    python benchmarks/profiles.py splitwise [--table CSV] [--write]
    python benchmarks/profiles.py aiconfigurator [--write]

`splitwise`: the measured times of Llama-2-70B on A100 and H100 (a 2023 engine); prints, by GPU type and TP, the
median absolute error of the fit on all points, of a fit on the other two TPs (cross-validation), and of the
default efficiencies. `aiconfigurator`: what `aiconfigurator-core` (NVIDIA, Apache-2.0; it must be installed in
the Python that runs this) predicts for vLLM from kernels measured on A100, H100, H200, B200 and L40S. `--write`
replaces the profile in src/hexgen2/cost/profiles.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hexgen2.calibrate import measured_table
from hexgen2.calibrate.fit import Fit, Measured, errors_of, fit
from hexgen2.calibrate.profile_file import profile_of, profile_text
from hexgen2.cost import Efficiency, StageShape, default_efficiency
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model

ROOT = Path(__file__).parent.parent
TABLE = ROOT.parent / "shared" / "data" / "measured_llama2_70b_a100_h100.csv"
PROFILES = ROOT / "src" / "hexgen2" / "cost" / "profiles"

Errors = Mapping[tuple[str, int], float]

SYSTEMS = {
    "A100-80G-SXM": ("a100_sxm", "0.14.0", (1, 2, 4, 8)),
    "H100-80G-SXM": ("h100_sxm", "0.24.0", (1, 2, 4, 8)),
    "H200-141G-SXM": ("h200_sxm", "0.24.0", (1, 2, 4, 8)),
    "B200-180G-SXM": ("b200_sxm", "0.24.0", (1, 2, 4, 8)),
    # TP 4 and 8: its machine's PCIe tree gives a GPU 2 to 4 GB/s, which is not the type's.
    "L40S": ("l40s", "0.24.0", (1, 2)),
}
"""GPU type: its name there, the vLLM whose kernels were measured, the TPs that are fitted."""

MODELS = {
    "llama-3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "llama-3.1-70b": "meta-llama/Meta-Llama-3.1-70B",
}
PREFILLS = [(1, tokens) for tokens in (128, 256, 512, 1024, 2048, 4096, 8192)]
PREFILLS += [(4, 512), (8, 512), (16, 512), (2, 2048), (4, 2048), (2, 4096)]
DECODES = [
    (batch, context) for batch in (1, 4, 16, 32, 64, 128, 256) for context in (128, 512, 1024, 2048, 4096)
]
START_KERNELS = {
    "compute": 0.6,
    "attention": 0.5,
    "memory": 0.8,
    "kv": 0.7,
    "link": 0.7,
    "reduce_hops": 2.0,
    "layer_overhead_s": 4e-5,
    "step_overhead_s": 0.0,
}
FREE_KERNELS = ("compute", "attention", "memory", "kv", "link", "reduce_hops", "layer_overhead_s")


def splitwise(table: Path, write: bool) -> None:
    """Fit, print, and write `splitwise-2023`."""
    points = measured_table.read(table)
    fits: dict[str, tuple[Sequence[Measured], Fit]] = {}
    for name, found in points.items():
        result = measured_table.fit_gpu(name, found)
        fits[name] = (found, result)
        print(f"{name}: {len(found)} points")
        print_fit(result)
        here = measured_table.median_errors(found, result.errors)
        across = measured_table.cross_validated(name, found)
        plain = measured_table.median_errors(found, errors_of(name, found, default_efficiency(gpu_type(name))))
        print_errors({"fitted": here, "cross-validated": across, "defaults": plain})
    if write:
        save(
            "splitwise-2023",
            "Mutinifni/splitwise-sim data/perf_model.csv (MIT): Llama-2-70B on 2, 4 and 8 GPUs; rows of TP 2 "
            "with batch 64 left out (impossible: faster than batch 8)",
            "a 2023 engine without CUDA graphs",
            fits,
        )


def aiconfigurator(write: bool) -> None:
    """Fit, print, and write `aiconfigurator-0.12`."""
    fits: dict[str, tuple[Sequence[Measured], Fit]] = {}
    for name in SYSTEMS:
        points = predictions(name)
        # Its predictions are sums of kernels: the host's work is not in them and stays the default.
        default = default_efficiency(gpu_type(name))
        begin = default.model_copy(update=START_KERNELS)
        result = fit(name, points, begin, FREE_KERNELS)
        fits[name] = (points, with_step(result, default))
        print(f"{name}: {len(points)} points")
        print_fit(result)
        print_errors({"fitted": measured_table.median_errors(points, result.errors)})
    if write:
        save(
            "aiconfigurator-0.12",
            "aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), its predictions for vLLM (0.24.0; A100: "
            f"0.14.0) of {', '.join(MODELS)} in bf16; step_overhead_s is not in them and is the default",
            "vLLM 0.24.0 (A100: 0.14.0)",
            fits,
        )


def with_step(result: Fit, default: Efficiency) -> Fit:
    """The fit with the default overhead of a step."""
    update = {"step_overhead_s": default.step_overhead_s}
    return Fit(result.efficiency.model_copy(update=update), result.intervals, result.errors)


def predictions(name: str) -> list[Measured]:
    """What aiconfigurator-core predicts for one GPU type."""
    try:
        from aiconfigurator_core.sdk.engine import EngineHandle
    except ImportError:
        sys.exit("aiconfigurator-core is not installed here: pip install aiconfigurator-core==0.12.0")
    logging.disable(logging.WARNING)
    system, version, tps = SYSTEMS[name]
    gpu = gpu_type(name)
    found: list[Measured] = []
    for model_name, path in MODELS.items():
        model = load_model(model_name)
        for tp in tps:
            engine = EngineHandle.compile(path, system, "vllm", backend_version=version, tp_size=tp)
            layout = (StageShape(gpu, tp, model.layers, gpu.link if tp > 1 else None),)
            for batch, tokens in PREFILLS:
                seconds = engine.predict_prefill_latency(batch, tokens) / 1e3
                found.append(Measured(model, "prefill", layout, batch, tokens, seconds))
            for batch, tokens in DECODES:
                seconds = engine.predict_decode_latency(batch, tokens, 2) / 1e3
                found.append(Measured(model, "decode", layout, batch, tokens, seconds))
    return found


def save(name: str, source: str, engine: str, fits: Mapping[str, tuple[Sequence[Measured], Fit]]) -> None:
    """Write a profile where the package looks for it."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = PROFILES / f"{name}.yaml"
    path.write_text(profile_text(profile_of(name, source, engine, date, fits)))
    print(f"written: {path.relative_to(ROOT)}")


def print_fit(result: Fit) -> None:
    for name, interval in result.intervals.items():
        unknown = "" if interval.known else "   (not determined)"
        print(f"  {name:20} {interval.value:10.3g}   95%: {interval.low:.3g} to {interval.high:.3g}{unknown}")


def print_errors(columns: Mapping[str, Errors]) -> None:
    print(f"  median |error|  {''.join(f'{name:>18}' for name in columns)}")
    for key in sorted(next(iter(columns.values()))):
        cells = "".join(f"{errors[key]:18.1%}" for errors in columns.values())
        print(f"  {key[0]:8} TP {key[1]}   {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("splitwise", "aiconfigurator"))
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--write", action="store_true", help="replace the shipped profile")
    arguments = parser.parse_args()
    if arguments.what == "splitwise":
        splitwise(arguments.table, arguments.write)
    else:
        aiconfigurator(arguments.write)


if __name__ == "__main__":
    main()
