"""``hexgen2 explain``: show a saved plan and why it is as it is, as text and as a picture."""

from __future__ import annotations

import argparse

from hexgen2.cli import output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("explain", help="show a saved plan and its reasons", description=__doc__)
    parser.add_argument("plan", metavar="PLAN", help="plan file (JSON)")
    parser.add_argument("--picture", metavar="FILE", help="draw the plan here (.svg, .png or .pdf)")
    parser.add_argument("--network", metavar="FILE", help="draw it over the network here (.svg)")
    parser.add_argument("--html", metavar="FILE", help="write all of it here as one HTML page")
    parser.add_argument("--trace", metavar="FILE", help="a trace of `plan --trace`, shown in the page")
    parser.add_argument(
        "--why", action="store_true", help="plan again for stronger engines: what do this one's rules cost?"
    )
    parser.add_argument(
        "--shadow", action="store_true", help="plan again with one more GPU of each type: what would it add?"
    )
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.report import explanation, group_line, print_explanation, print_plan, save_picture
    from hexgen2.report.page import load_trace, network_svg, plan_page, standalone
    from hexgen2.specs.plan import load_plan

    plan = load_plan(args.plan)
    trace = load_trace(args.trace) if args.trace else None
    console = output.progress_console()
    if args.why or args.shadow:
        from hexgen2.cli.planning import problem_of
        from hexgen2.scheduler.explain import with_engines_compared, with_more_gpus

        problem = problem_of(plan)
        with console.status("planning again"):
            plan = with_engines_compared(problem, plan) if args.why else plan
            plan = with_more_gpus(problem, plan) if args.shadow else plan
    if args.picture:
        save_picture(plan, args.picture)
        console.print(f"picture written to {args.picture}")
    if args.network:
        output.write_text(args.network, standalone(network_svg(plan)))
        console.print(f"network written to {args.network}")
    if args.html:
        output.write_text(args.html, plan_page(plan, trace))
        console.print(f"page written to {args.html}")
    if args.json:
        lines = [group_line(plan, group) for group in plan.groups]
        output.print_json({**plan.document(), "lines": lines, "explanation": explanation(plan)})
    else:
        print_plan(output.result_console(), plan)
        print_explanation(output.result_console(), plan)
    return 0
