"""``hexgen2 simulate``: run a plan over a workload as discrete events, at the cost model's speed."""

from __future__ import annotations

import argparse

from hexgen2.cli import inputs, output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("simulate", help="simulate a plan", description=__doc__)
    parser.add_argument("plan", metavar="PLAN", help="plan file (JSON)")
    parser.add_argument("--workload", required=True, metavar="NAME|FILE")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--rate",
        type=inputs.positive,
        metavar="RPS",
        help="arrival rate (default: a trace's own; 75%% of the plan's throughput for a shipped workload)",
    )
    load.add_argument("--offline", action="store_true", help="all requests are there at the start")
    parser.add_argument(
        "--requests", type=inputs.count, metavar="N", help="how many (default: a whole trace, else 1000)"
    )
    parser.add_argument("--seed", type=inputs.count_or_none, default=0)
    inputs.add_profiles(parser)
    inputs.add_slo(parser)
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import numpy as np
    from rich.progress import Progress

    from hexgen2.cost import CostModel
    from hexgen2.cost.profile_files import load_efficiencies
    from hexgen2.report.results import print_results
    from hexgen2.simulator import Requests, offline, poisson, replay, simulate
    from hexgen2.specs.catalog.models import load_model
    from hexgen2.specs.catalog.workloads import load_workload
    from hexgen2.specs.plan import Slo, check_groups, load_plan

    plan = load_plan(args.plan)
    model = load_model(plan.model)
    check_groups(plan, model, args.plan)
    workload = load_workload(args.workload)
    rng = np.random.default_rng(args.seed)
    requests: Requests
    if workload.arrivals_s is not None and not args.offline:
        requests = replay(workload, args.requests, args.rate)
    else:
        lengths = workload.sample(args.requests or 1000, rng)
        rate = args.rate or 0.75 * plan.throughput_rps
        requests = offline(lengths) if args.offline else poisson(lengths, rate, rng)
    slo = Slo(ttft_s=args.slo_ttft or plan.slo.ttft_s, tpot_s=args.slo_tpot or plan.slo.tpot_s)
    cost = CostModel(model, load_efficiencies(args.profile or plan.profiles))
    with Progress(console=output.progress_console(), transient=True) as bar:
        task = bar.add_task("simulating", total=len(requests))
        result = simulate(
            plan, cost, requests, slo=slo, progress=lambda done, _: bar.update(task, completed=done)
        )
    if args.json:
        output.print_json(result.document())
    else:
        print_results(output.result_console(), result.document())
    return 0
