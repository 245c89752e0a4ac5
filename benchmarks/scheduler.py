"""Time and quality of the solvers: what produced the figures of docs/scheduler.md.

    python benchmarks/scheduler.py --sizes 64,320,1024 [--solvers hexgen2] [--seeds 1] [-o DIR]
    python benchmarks/scheduler.py --sizes 64,320,1024 --ten-times
    python benchmarks/scheduler.py --ablation [--seeds 3] [--time-limit 1]

Writes NAME.json (a row per run, with the best value over time), NAME.md and plots (SVG) into a folder. All
plans are valued with links and NICs shared, whatever their solver counted while it searched.

--ten-times: the search as it is, and the same one given ten times as long as it took.
--ablation: the paper's comparison on the four mixed clusters of 20 GPUs: every solver for the same time. The
default solver counts with what it had found when that time was over; the bound comes after.

Time limits and curves are on the process's own clock (a search runs on one thread: set OMP_NUM_THREADS=1), so
that other work on the machine does not change them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scheduler_tables import ablation_table, instance_table, ten_times_table

from hexgen2.cli.collector import seldom_collected
from hexgen2.cost.replica import CostModel
from hexgen2.scheduler import PROFILES, Problem, Progress, schedule
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import load_cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import ROLES

CLUSTERS = Path(__file__).parents[1] / "examples" / "clusters"
BY_SIZE = {
    "8": ["homogeneous-8xh100"],
    "20": ["mixed-1", "mixed-2", "mixed-3", "mixed-4", "mixed-5"],
    "64": ["large-64"],
    "320": ["large-320"],
    "1024": ["large-1024"],
}
WORKLOADS = ("hpld", "hphd", "lphd", "lpld")
MODELS = ("llama-2-70b", "opt-30b")
SOLVERS = ("hexgen2", "paper", "genetic", "random-swap", "hexgen", "colocated", "distserve")
ABLATED = ("hexgen2", "paper", "genetic", "random-swap")
ENDLESS = ("colocated", "distserve")
"""Solvers that look at all they know and have no use for a time limit."""
LONGER = 10

Row = dict[str, Any]


def run(
    cluster: str, model: str, workload: str, solver: str, engine: str, seed: int, limit: float | None
) -> Row:
    """One plan: its value and bound, the best value over time, and the times it took."""
    problem = Problem(
        cluster=load_cluster(CLUSTERS / f"{cluster}.yaml"),
        workload=workload,
        lengths=load_workload(workload).representative(256),
        cost=CostModel(load_model(model)),
        engine=PROFILES[engine],
    )
    row: Row = {
        "cluster": cluster,
        "gpus": len(problem.cluster.gpus),
        "model": model,
        "workload": workload,
        "solver": solver,
        "seed": seed,
        "time_limit_s": limit,
    }
    steps: list[Progress] = []
    started = time.perf_counter()
    try:
        with seldom_collected():
            plan = schedule(
                problem,
                solver=solver,
                seed=seed,
                time_limit_s=None if solver in ENDLESS else limit,
                progress=steps.append,
                clock=time.process_time,
            )
    except InputError as error:
        return {**row, "error": str(error)}
    return {
        **row,
        "rps": plan.objective.value,
        "upper_bound": plan.upper_bound,
        "gap": plan.gap,
        "cpu_s": plan.wall_s,
        "wall_s": time.perf_counter() - started,
        "groups": {role: len(plan.role_groups(role)) for role in ROLES},
        "usd_per_hour": plan.price_per_hour,
        "curve": [[step.seconds, step.value] for step in steps],
    }


def instances(args: argparse.Namespace, clusters: list[str]) -> Iterator[tuple[str, str, str, int]]:
    """(cluster, model, workload, seed)."""
    for cluster in clusters:
        for model in args.models.split(","):
            for workload in args.workloads.split(","):
                for seed in range(args.seeds):
                    yield cluster, model, workload, seed


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of the mode that was asked for."""
    if args.ablation:
        names = args.solvers.split(",") if args.solvers else ABLATED
        limit = args.time_limit or 1.0
        for cluster, model, workload, seed in instances(args, BY_SIZE["20"][:4]):
            for solver in names:
                yield _in_time(run(cluster, model, workload, solver, args.engine, seed, limit), limit)
        return
    for size in args.sizes.split(","):
        for cluster, model, workload, seed in instances(args, BY_SIZE[size]):
            if args.ten_times:
                first = run(cluster, model, workload, "hexgen2", args.engine, seed, None)
                yield first
                yield run(cluster, model, workload, "hexgen2", args.engine, seed, LONGER * first["cpu_s"])
                continue
            names = args.solvers.split(",") if args.solvers else (SOLVERS if int(size) <= 20 else SOLVERS[:1])
            for solver in names:
                yield run(cluster, model, workload, solver, args.engine, seed, args.time_limit)


def _in_time(row: Row, limit: float) -> Row:
    """The row with what the default solver had when the time was over (the others stop then)."""
    if "error" in row or row["solver"] != "hexgen2":
        return row
    found = [value for seconds, value in row["curve"] if seconds <= limit]
    return {**row, "final_rps": row["rps"], "rps": max(found, default=0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8,20", help=f"of {', '.join(BY_SIZE)}")
    parser.add_argument("--solvers", default=None, help=f"of {', '.join(SOLVERS)}; above 20 GPUs: hexgen2")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--engine", default="vllm", choices=sorted(PROFILES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=None, help="seconds for each plan")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--ten-times", action="store_true", help="also given ten times as long")
    mode.add_argument("--ablation", action="store_true", help="the paper's ablation at 20 GPUs")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/benchmarks"), help="a folder")
    args = parser.parse_args()
    name = "scheduler" + ("-ablation" if args.ablation else "-ten-times" if args.ten_times else "")
    rows: list[Row] = []
    for row in measured(args):
        rows.append(row)
        shown = {key: value for key, value in row.items() if key != "curve"}
        print(json.dumps(shown), file=sys.stderr, flush=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / name
    target.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}), encoding="utf-8")
    table = ablation_table if args.ablation else ten_times_table if args.ten_times else instance_table
    text = table(rows)
    target.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    if not args.no_plots:
        from scheduler_plots import plot_curves, plot_sizes

        plot_curves(rows, args.output / f"{name}-over-time.svg")
        plot_sizes(rows, args.output / f"{name}-sizes.svg")
    print(text)


if __name__ == "__main__":
    main()
