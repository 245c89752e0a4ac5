"""What planning for goodput is worth: its plans beside those for throughput, under the same load in simulation.

    python benchmarks/goodput.py [--cluster NAME] [--requests N] [--seed N] [--at-rates]

For each model, workload and pair of targets: what a plan for throughput and one for goodput promise, and the
part of the requests within both targets when either serves at the planned goodput (the same Poisson arrivals
for both).
Prints a table of docs/scheduler.md; with --at-rates how the latencies that `plan --rate` tells compare with the
simulator's, at parts of each plan's goodput (docs/cost-model.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from hexgen2.cost import CostModel
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.scheduler.prediction import predict
from hexgen2.scheduler.problem import ObjectiveName
from hexgen2.simulator import poisson, simulate
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import load_cluster
from hexgen2.specs.plan import Plan, Slo

CLUSTERS = Path(__file__).parents[1] / "examples" / "clusters"
LOADS = [(model, workload) for model in ("llama-2-70b", "opt-30b") for workload in ("hphd", "lpld")]
PARTS = (0.5, 0.8, 1.0)
TARGETS = (Slo(ttft_s=2.0, tpot_s=0.1), Slo(ttft_s=1.0, tpot_s=0.05))


def asked(cluster: str, cost: CostModel, workload: str, objective: ObjectiveName, slo: Slo) -> Problem:
    """For a plan under engine profile `vllm`."""
    return Problem(
        cluster=load_cluster(CLUSTERS / f"{cluster}.yaml"),
        workload=workload,
        lengths=load_workload(workload).representative(256),
        cost=cost,
        engine=PROFILES["vllm"],
        objective=objective,
        slo=slo,
    )


def roles(plan: Plan) -> str:
    """A letter for each group."""
    return "".join(sorted((group.role[0] for group in plan.groups), key="pdc".index))


def at_rates(cluster: str, requests: int, seed: int) -> None:
    """Predicted latencies over simulated ones, for every plan of the first table at parts of its goodput."""
    print("| model, load | targets | rate | TTFT mean | TTFT P90 | TPOT mean | TPOT P90 | within targets |")
    print("|---|---|---|---|---|---|---|---|")
    for model, workload in LOADS:
        cost = CostModel(load_model(model))
        for slo in TARGETS:
            problem = asked(cluster, cost, workload, "goodput", slo)
            plan = schedule(problem)
            for part in PARTS:
                rate = part * plan.objective.value
                rng = np.random.default_rng(seed)
                arrivals = poisson(load_workload(workload).sample(requests, rng), rate, rng)
                seen = simulate(plan, cost, arrivals, slo=slo).document()
                said = predict(problem, plan, rate)
                assert said.ttft_s is not None
                assert said.tpot_s is not None
                pairs = [
                    (getattr(latency, figure), seen[name][figure])
                    for name, latency in (("ttft_s", said.ttft_s), ("tpot_s", said.tpot_s))
                    for figure in ("mean", "p90")
                ]
                ratios = " | ".join(f"{found / true - 1:+.0%}" for found, true in pairs)
                name = f"{model}, {workload} | {slo.ttft_s:g} s, {1e3 * (slo.tpot_s or 0):g} ms | {part:.0%}"
                within = f"{said.attainment or 0:.0%}, simulated {seen['slo']['attainment']:.0%}"
                print(f"| {name} | {ratios} | {within} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="mixed-1")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals")
    parser.add_argument("--at-rates", action="store_true", help="the other table")
    args = parser.parse_args()
    if args.at_rates:
        at_rates(args.cluster, args.requests, args.seed)
        return 0
    print("| model, load | targets | throughput | goodput | groups | within targets | the throughput plan |")
    print("|---|---|---|---|---|---|---|")
    for model, workload in LOADS:
        cost = CostModel(load_model(model))
        most = schedule(asked(args.cluster, cost, workload, "throughput", Slo()))
        for slo in TARGETS:
            timely = schedule(asked(args.cluster, cost, workload, "goodput", slo))
            rng = np.random.default_rng(args.seed)
            lengths = load_workload(workload).sample(args.requests, rng)
            requests = poisson(lengths, timely.objective.value, rng)
            within = [simulate(plan, cost, requests, slo=slo).document()["slo"] for plan in (timely, most)]
            groups = f"{roles(most)} → {roles(timely)}"
            print(
                f"| {model}, {workload} | {slo.ttft_s:g} s, {1e3 * (slo.tpot_s or 0):g} ms "
                f"| {most.objective.value:.3g} | {timely.objective.value:.3g} | {groups} "
                f"| {within[0]['attainment']:.0%} | {within[1]['attainment']:.0%} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
