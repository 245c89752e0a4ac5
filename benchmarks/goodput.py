"""What planning for goodput is worth: its plans beside those for throughput, under the same load in simulation.

    python benchmarks/goodput.py [--cluster NAME] [--requests N] [--seed N]

For each model, workload and pair of targets: what a plan for throughput and one for goodput promise, and the
part of the requests within both targets when either serves at the planned goodput (the same Poisson arrivals
for both).
Prints a table of docs/scheduler.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from hexgen2.cost import CostModel
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.scheduler.problem import ObjectiveName
from hexgen2.simulator import poisson, simulate
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import load_cluster
from hexgen2.specs.plan import Plan, Slo

CLUSTERS = Path(__file__).parents[1] / "examples" / "clusters"
LOADS = [(model, workload) for model in ("llama-2-70b", "opt-30b") for workload in ("hphd", "lpld")]
TARGETS = (Slo(ttft_s=2.0, tpot_s=0.1), Slo(ttft_s=1.0, tpot_s=0.05))


def planned(cluster: str, cost: CostModel, workload: str, objective: ObjectiveName, slo: Slo) -> Plan:
    """The default solver's plan under engine profile `vllm`."""
    return schedule(
        Problem(
            cluster=load_cluster(CLUSTERS / f"{cluster}.yaml"),
            workload=workload,
            lengths=load_workload(workload).representative(256),
            cost=cost,
            engine=PROFILES["vllm"],
            objective=objective,
            slo=slo,
        )
    )


def roles(plan: Plan) -> str:
    """A letter for each group."""
    return "".join(sorted((group.role[0] for group in plan.groups), key="pdc".index))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="mixed-1")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals")
    args = parser.parse_args()
    print("| model, load | targets | throughput | goodput | groups | within targets | the throughput plan |")
    print("|---|---|---|---|---|---|---|")
    for model, workload in LOADS:
        cost = CostModel(load_model(model))
        most = planned(args.cluster, cost, workload, "throughput", Slo())
        for slo in TARGETS:
            timely = planned(args.cluster, cost, workload, "goodput", slo)
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
