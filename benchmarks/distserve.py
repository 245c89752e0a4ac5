"""DistServe's published point, from our cost model and simulator.

    python benchmarks/distserve.py [--requests 3000] [--profile NAME]

DistServe's simulator (its README): OPT-13B, ShareGPT, at most 4 A100-80G of one node, P90 TTFT within 0.2 s and
P90 TPOT within 0.1 s: best 1.56 requests/s per GPU, with prefill TP 2 and decode TP 1. For the same layout (and
others of up to 4 GPUs) this finds the highest Poisson rate at which our simulation meets both targets.

What had to be assumed: lengths, of which the DistServe paper gives means (755.5 in, 200.3 out) and a picture;
here log-normal with sigma 1 and 0.7, prompt and answer independent, means kept, then answers cut to what OPT's
2,048 tokens leave. The engine: the default efficiencies, of a current one; DistServe's own is written in C++
without the overheads of Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import sqrt

import numpy as np

from hexgen2.cost import CostModel, Settings
from hexgen2.cost.profile_files import load_efficiencies
from hexgen2.simulator import poisson, simulate
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.plan import Plan, parse_plan
from hexgen2.specs.workload import FloatArray, Lengths

PUBLISHED_RPS_PER_GPU = 1.56
PUBLISHED_LAYOUT = (2, 1)
LAYOUTS = ((1, 1), PUBLISHED_LAYOUT, (1, 2), (2, 2))
TTFT_S, TPOT_S = 0.2, 0.1
MEAN_INPUT, MEAN_OUTPUT, LONGEST = 755.5, 200.3, 2048
SIGMAS = (1.0, 0.7)


def sharegpt(count: int, sigma: float, rng: np.random.Generator) -> Lengths:
    """Lengths with the published means."""
    inputs = _lognormal(count, MEAN_INPUT, sigma, rng)
    outputs = _lognormal(count, MEAN_OUTPUT, sigma, rng)
    whole = np.rint(inputs).astype(np.int64)
    return Lengths(whole, np.clip(np.rint(outputs).astype(np.int64), 1, LONGEST - whole))


def _lognormal(count: int, mean: float, sigma: float, rng: np.random.Generator) -> FloatArray:
    """Log-normal, within 4 and the context less some room for the other part, with its mean restored."""
    drawn: FloatArray = np.exp(sigma * rng.standard_normal(count))
    for _ in range(30):
        drawn = np.clip(drawn * (mean / drawn.mean()), 4, LONGEST - 48)
    return drawn


def cost_model(profiles: Sequence[str] = ()) -> CostModel:
    """OPT-13B on an engine that moves KV caches beside its decoding, as DistServe's does."""
    settings = Settings(fetch_between_steps=False)
    return CostModel(load_model("opt-13b"), load_efficiencies(profiles), settings)


def disaggregated(prefill_tp: int, decode_tp: int) -> Plan:
    """One prefill and one decode group on a node of four A100-80G."""
    model = load_model("opt-13b")
    gpus = [f"a/{number}" for number in range(4)]

    def group(name: str, role: str, mine: list[str]) -> dict[str, object]:
        stage = {"gpus": mine, "tp": len(mine), "first_layer": 0, "layers": model.layers}
        fixed = {"share": 1.0, "price_per_hour": 0.0, "capacity_rps": 1.0, "max_batch": 256}
        return {"id": name, "role": role, **fixed, "stages": [stage]}

    route = {"from": "p0", "to": "d0", "share": 1.0, "rps": 1.0, "capacity_rps": 1.0}
    document = {
        "version": 1,
        "cluster": {"name": "distserve", "nodes": [{"name": "a", "gpu": "A100-80G-SXM", "count": 4}]},
        **{"model": model.name, "workload": "sharegpt", "engine": "any", "solver": "none", "seed": 0},
        "objective": {"name": "goodput", "value": 1.0, "unit": "requests/s"},
        **{"throughput_rps": 1.0, "output_tokens_per_s": 1.0, "price_per_hour": 0.0, "wall_s": 0.0},
        "groups": [
            group("p0", "prefill", gpus[:prefill_tp]),
            group("d0", "decode", gpus[prefill_tp : prefill_tp + decode_tp]),
        ],
        "routes": [route],
        "bottleneck": {"elements": [], "text": ""},
    }
    return parse_plan(document, "distserve")


def meets_targets(plan: Plan, cost: CostModel, sigma: float, rate: float, count: int, seed: int = 0) -> bool:
    """Whether P90 TTFT and P90 TPOT are within the targets at this rate."""
    rng = np.random.default_rng(seed)
    result = simulate(plan, cost, poisson(sharegpt(count, sigma, rng), rate, rng)).document()
    return bool(result["ttft_s"]["p90"] <= TTFT_S and result["tpot_s"]["p90"] <= TPOT_S)


def best_rate_per_gpu(layout: tuple[int, int], cost: CostModel, sigma: float, count: int = 3000) -> float:
    """The highest rate that meets the targets, per GPU in use, to 1%; 0 where none does."""
    plan = disaggregated(*layout)
    low, high = 0.1, 64.0
    if not meets_targets(plan, cost, sigma, low, count):
        return 0.0
    while high / low > 1.01:
        middle = sqrt(low * high)
        if meets_targets(plan, cost, sigma, middle, count):
            low = middle
        else:
            high = middle
    return low / sum(layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--profile", action="append", default=[])
    arguments = parser.parse_args()
    cost = cost_model(arguments.profile)
    print(f"published: {PUBLISHED_RPS_PER_GPU} requests/s per GPU with prefill TP 2, decode TP 1")
    for sigma in SIGMAS:
        for layout in LAYOUTS:
            rate = best_rate_per_gpu(layout, cost, sigma, arguments.requests)
            against = f"  {rate / PUBLISHED_RPS_PER_GPU - 1:+.0%}" if layout == PUBLISHED_LAYOUT else ""
            print(
                f"sigma {sigma}, prefill TP {layout[0]}, decode TP {layout[1]}: {rate:.2f}{against}", flush=True
            )


if __name__ == "__main__":
    main()
