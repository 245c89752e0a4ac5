"""``hexgen2 plan``: decide groups, roles, layouts and routes for a cluster."""

from __future__ import annotations

import argparse
import time

from hexgen2.cli import inputs, output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("plan", help="plan a model on a cluster", description=__doc__)
    parser.add_argument("--cluster", required=True, metavar="FILE", help="cluster file (YAML)")
    inputs.add_model_and_workload(parser)
    parser.add_argument("--objective", choices=("throughput", "goodput"), default="throughput")
    inputs.add_slo(parser)
    parser.add_argument(
        "--rate", type=inputs.positive, metavar="RPS", help="arrival rate that the plan must carry"
    )
    inputs.add_engine(parser)
    parser.add_argument(
        "--solver",
        default="hexgen2",
        metavar="NAME",
        help="hexgen2 (default), paper, exhaustive (small clusters), "
        "or a baseline: distserve, distserve-pairs, hexgen, colocated, genetic, random-swap",
    )
    parser.add_argument(
        "--init",
        choices=("spectral", "metis"),
        default="spectral",
        help="first partition of the GPUs where a search begins from one (metis needs pymetis)",
    )
    inputs.add_profiles(parser)
    parser.add_argument(
        "--time-limit", type=inputs.positive, metavar="S", help="stop the search after S seconds"
    )
    parser.add_argument("--seed", type=inputs.count_or_none, default=0)
    parser.add_argument(
        "--shadow", action="store_true", help="plan again with one more GPU of each type: what would it add?"
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="write how the search went here (JSON), for `explain --html`"
    )
    parser.add_argument("-o", "--output", metavar="PLAN", help="write the plan here (JSON)")
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.cli.collector import seldom_collected
    from hexgen2.cli.planning import load_problem
    from hexgen2.report import print_plan
    from hexgen2.report.page import TracePoint, trace_document
    from hexgen2.scheduler import schedule
    from hexgen2.scheduler.problem import Progress

    problem = load_problem(args)
    console = output.progress_console()
    steps: list[Progress] = []
    with seldom_collected(), console.status("planning") as status:

        def watch(step: Progress) -> None:
            steps.append(step)
            status.update(f"{step.phase}: {step.value:.4g} requests/s after {step.seconds:.0f} s")

        plan = schedule(
            problem,
            solver=args.solver,
            seed=args.seed,
            time_limit_s=args.time_limit,
            progress=watch,
            clock=time.monotonic,
            shadow=args.shadow,
        )
    if args.output:
        output.write_json(args.output, plan.document())
        console.print(f"plan written to {args.output}")
    if args.trace:
        points = [TracePoint(seconds=step.seconds, phase=step.phase, value=step.value) for step in steps]
        output.write_json(args.trace, trace_document(points, plan.wall_s))
        console.print(f"trace written to {args.trace}")
    if args.json:
        output.print_json(plan.document())
    else:
        print_plan(output.result_console(), plan)
    return 0
