"""What routing by request class gains, in simulation: one plan with its classes and the same without.

    python benchmarks/classes.py [--cluster NAME | --nodes H100-80G-SXM:1,A10G:4] [--model NAME]
                                 [--workload NAME] [--objective goodput|throughput]
                                 [--slo-ttft S] [--slo-tpot S]

Goodput is the highest rate at which 90% of the requests meet the targets (bisection over rates, the same
requests for both); throughput what comes out per second when half as much again comes in. `--nodes`: a cluster
of nodes of these types and counts, joined by 25 Gb/s. Prints a row's figures of docs/scheduler.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from hexgen2.cost import CostModel
from hexgen2.cost.goodput import ATTAINMENT
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.simulator import Requests, poisson, simulate
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import Cluster, load_cluster, parse_cluster
from hexgen2.specs.plan import Plan, Slo

CLUSTERS = Path(__file__).parents[1] / "examples" / "clusters"


def without_classes(plan: Plan) -> Plan:
    """The same groups and layouts, all requests routed alike."""
    groups = tuple(group.model_copy(update={"class_shares": {}}) for group in plan.groups)
    routes = tuple(route.model_copy(update={"class_shares": {}}) for route in plan.routes if route.share > 0)
    return plan.model_copy(update={"classes": (), "class_routing": None, "groups": groups, "routes": routes})


def highest_rate(plan: Plan, cost: CostModel, count: int, *, max_tokens_known: bool = True) -> float:
    """Requests/s at which `ATTAINMENT` of the requests meet the plan's targets in simulation."""
    rng = np.random.default_rng(11)
    lengths = load_workload(plan.workload).sample(count, rng)
    arrivals = np.cumsum(rng.exponential(1.0, size=count))
    ends = slice(count // 5, count - count // 5)

    def met(rate: float) -> float:
        requests = Requests(arrivals / rate, lengths.inputs, lengths.outputs)
        times = simulate(plan, cost, requests, max_tokens_known=max_tokens_known).timeline
        first = times.first - times.arrival
        gaps = np.maximum(1, lengths.outputs - 1)
        steady = (times.end - times.first) / gaps
        good = (first <= (plan.slo.ttft_s or np.inf)) & (steady <= (plan.slo.tpot_s or np.inf))
        return float(good[ends].mean())

    low, high = 0.0, 2 * plan.throughput_rps
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) >= ATTAINMENT else (low, middle)
    return (low + high) / 2


def most_served(plan: Plan, cost: CostModel, count: int, *, max_tokens_known: bool = True) -> float:
    """Requests/s that end while half as many again come as are planned, over the middle half of the ends."""
    rng = np.random.default_rng(11)
    lengths = load_workload(plan.workload).sample(count, rng)
    requests = poisson(lengths, 1.5 * plan.throughput_rps, rng)
    ends = np.sort(simulate(plan, cost, requests, max_tokens_known=max_tokens_known).timeline.end)
    first, last = count // 4, 3 * count // 4
    return float((last - first) / (ends[last] - ends[first]))


def cluster_of(args: argparse.Namespace) -> Cluster:
    if args.nodes is None:
        return load_cluster(CLUSTERS / f"{args.cluster}.yaml")
    nodes = [dict(zip(("gpu", "count"), node.split(":"), strict=True)) for node in args.nodes.split(",")]
    document = {
        "name": args.nodes,
        "nodes": [
            {"name": f"n{i}", "gpu": one["gpu"], "count": int(one["count"])} for i, one in enumerate(nodes)
        ],
        "network": {"default": {"gbps": 25, "latency_ms": 0.2}},
    }
    return parse_cluster(document, "--nodes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cluster", default="h100-and-a6000")
    where.add_argument("--nodes", metavar="TYPE:COUNT,...")
    parser.add_argument("--objective", choices=("goodput", "throughput"), default="goodput")
    parser.add_argument("--model", default="llama-2-13b")
    parser.add_argument("--workload", default="azure-code")
    parser.add_argument("--slo-ttft", type=float, default=1.0)
    parser.add_argument("--slo-tpot", type=float, default=0.08)
    parser.add_argument("--requests", type=int, default=6000)
    args = parser.parse_args()
    cost = CostModel(load_model(args.model))
    problem = Problem(
        cluster=cluster_of(args),
        workload=args.workload,
        lengths=load_workload(args.workload).representative(256),
        cost=cost,
        engine=PROFILES["vllm"],
        objective=args.objective,
        slo=Slo(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot),
        model_name=args.model,
    )
    plan = schedule(problem)
    print("| routing | planned | simulated |")
    print("|---|---|---|")
    measured = highest_rate if args.objective == "goodput" else most_served
    alike = measured(without_classes(plan), cost, args.requests)
    print(f"| all alike | {plan.objective.value:.2f} | {alike:.2f} |")
    if plan.class_routing is None:
        print("no classes: the gain is below the threshold", file=sys.stderr)
        return 0
    routing = plan.class_routing
    found = measured(plan, cost, args.requests)
    planned = f"{routing.throughput_rps:.2f} ({routing.gain:+.1%})"
    print(f"| by class | {planned} | {found:.2f} ({found / alike - 1:+.1%}) |")
    found = measured(plan, cost, args.requests, max_tokens_known=False)
    print(f"| by class, max_tokens not named | | {found:.2f} ({found / alike - 1:+.1%}) |")
    for one in plan.classes:
        print(
            one.model_dump(), {g.id: round(g.class_shares[one.name], 3) for g in plan.groups}, file=sys.stderr
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
