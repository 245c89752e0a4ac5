"""``hexgen2 budget``: which GPUs to rent, for a price or for a rate."""

from __future__ import annotations

import argparse
import time

from hexgen2.cli import inputs, output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("budget", help="choose which GPUs to rent", description=__doc__)
    parser.add_argument("--catalog", required=True, metavar="FILE", help="nodes that can be rented (YAML)")
    inputs.add_model_and_workload(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--hourly", type=inputs.positive, metavar="USD", help="the most throughput for this price per hour"
    )
    asked.add_argument(
        "--rate", type=inputs.positive, metavar="RPS", help="the lowest price that serves this many requests/s"
    )
    parser.add_argument("--max-gpus", type=inputs.count, metavar="N", help="rent at most N GPUs")
    parser.add_argument("--objective", choices=("throughput", "goodput"), default="throughput")
    inputs.add_slo(parser)
    inputs.add_engine(parser)
    inputs.add_profiles(parser)
    parser.add_argument("--seed", type=inputs.count_or_none, default=0)
    parser.add_argument("-o", "--output", metavar="PLAN", help="write the plan of the chosen mix here (JSON)")
    parser.add_argument(
        "--cluster-out", metavar="FILE", help="write the chosen mix here as a cluster file (YAML)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw price against throughput here (.svg, .png or .pdf)"
    )
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.cli.planning import problem_for
    from hexgen2.probe import document_text
    from hexgen2.report import answer_document, print_answer, save_frontier
    from hexgen2.scheduler.budget import Asked, budget
    from hexgen2.specs.offers import load_offers

    started = time.monotonic()
    offers = load_offers(args.catalog)
    asked = Asked(hourly=args.hourly, rate=args.rate, max_gpus=args.max_gpus)
    problem = problem_for(args, offers.cluster([1] * len(offers.offers)), str(args.catalog), rate=None)
    console = output.progress_console()
    with console.status("looking at the offers") as status:
        answer = budget(problem, offers, asked, seed=args.seed, watch=status.update)
    if args.output:
        output.write_json(args.output, answer.best.plan.document())
        console.print(f"plan written to {args.output}")
    if args.cluster_out:
        output.write_text(args.cluster_out, document_text(answer.best.plan.cluster.document()))
        console.print(f"cluster written to {args.cluster_out}")
    if args.plot:
        save_frontier(offers, asked, answer, args.plot)
        console.print(f"plot written to {args.plot}")
    if args.json:
        document = answer_document(offers, asked, answer)
        output.print_json({**document, "wall_s": time.monotonic() - started})
    else:
        print_answer(output.result_console(), offers, asked, answer)
    return 0
