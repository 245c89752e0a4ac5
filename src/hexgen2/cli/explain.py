"""``hexgen2 explain``: show a saved plan, as text and as a picture."""

from __future__ import annotations

import argparse

from hexgen2.cli import output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("explain", help="show a saved plan", description=__doc__)
    parser.add_argument("plan", metavar="PLAN", help="plan file (JSON)")
    parser.add_argument("--picture", metavar="FILE", help="draw the plan here (.svg, .png or .pdf)")
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.report import group_line, print_plan, save_picture
    from hexgen2.specs.plan import load_plan

    plan = load_plan(args.plan)
    if args.picture:
        save_picture(plan, args.picture)
        output.progress_console().print(f"picture written to {args.picture}")
    if args.json:
        output.print_json({**plan.document(), "lines": [group_line(plan, group) for group in plan.groups]})
    else:
        print_plan(output.result_console(), plan)
    return 0
