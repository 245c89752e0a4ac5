"""``hexgen2 bench``: drive an OpenAI-compatible endpoint with a workload and measure what a client sees."""

from __future__ import annotations

import argparse
import asyncio

from hexgen2.cli import inputs, output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("bench", help="measure a served endpoint", description=__doc__)
    parser.add_argument("url", metavar="URL", help="for instance http://127.0.0.1:8000")
    parser.add_argument("--workload", required=True, metavar="NAME|FILE")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rate", type=inputs.positive, metavar="RPS", help="Poisson arrivals at this rate")
    load.add_argument("--concurrency", type=inputs.count, metavar="N", help="N requests in flight (default: 8)")
    parser.add_argument("--requests", type=inputs.count, default=100, metavar="N")
    parser.add_argument("--seed", type=inputs.count_or_none, default=0)
    inputs.add_api_key(parser)
    inputs.add_slo(parser)
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.loadgen import Load, measure
    from hexgen2.report.results import print_results
    from hexgen2.specs.catalog.workloads import load_workload
    from hexgen2.specs.plan import Slo

    load = Load(
        url=inputs.service(args.url),
        workload=load_workload(args.workload),
        requests=args.requests,
        rate_rps=args.rate,
        concurrency=None if args.rate else args.concurrency or 8,
        seed=args.seed,
        api_key=args.api_key,
        slo=Slo(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot),
    )
    document = asyncio.run(measure(load, output.progress_console()))
    if args.json:
        output.print_json(document)
    else:
        print_results(output.result_console(), document)
    return 0 if document["failed"] == 0 else 1
