"""Time and quality of the solvers: what produced the figures of docs/scheduler.md.

    python benchmarks/scheduler.py --sizes 64,320,1024 [--solvers hexgen2] [--seeds 1] [-o FILE]

Writes one JSON document with a row per run and prints a table. All plans are valued with links and NICs shared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from hexgen2.cost.replica import CostModel
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import load_cluster
from hexgen2.specs.errors import InputError

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


def run(
    cluster: str, model: str, workload: str, solver: str, args: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """One plan: its value, bound and times."""
    problem = Problem(
        cluster=load_cluster(CLUSTERS / f"{cluster}.yaml"),
        workload=workload,
        lengths=load_workload(workload).representative(256),
        cost=CostModel(load_model(model)),
        engine=PROFILES[args.engine],
    )
    row: dict[str, Any] = {
        "cluster": cluster,
        "model": model,
        "workload": workload,
        "solver": solver,
        "seed": seed,
    }
    wall, cpu = time.perf_counter(), time.process_time()
    limit = None if solver in ("colocated", "distserve") else args.time_limit
    try:
        plan = schedule(problem, solver=solver, seed=seed, time_limit_s=limit)
    except InputError as error:
        return {**row, "error": str(error)}
    return {
        **row,
        "rps": plan.objective.value,
        "upper_bound": plan.upper_bound,
        "gap": plan.gap,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "groups": {
            role: len(plan.role_groups(role))  # type: ignore[arg-type]
            for role in ("prefill", "decode", "colocated")
        },
        "usd_per_hour": plan.price_per_hour,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line per instance, one column per solver: requests/s (seconds of CPU)."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    cells: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["cluster"], row["model"], row["workload"]][row["solver"]].append(row)
    lines = [
        "| cluster | model | workload | " + " | ".join(solvers) + " | gap |",
        "|---" * (len(solvers) + 4) + "|",
    ]
    for key, by_solver in cells.items():
        shown = []
        for solver in solvers:
            done = [row for row in by_solver[solver] if "rps" in row]
            text = (
                "-"
                if not done
                else f"{mean(r['rps'] for r in done):.2f} ({mean(r['cpu_s'] for r in done):.1f} s)"
            )
            shown.append(text)
        gaps = [row["gap"] for row in by_solver.get("hexgen2", []) if row.get("gap") is not None]
        shown.append(f"{100 * mean(gaps):.1f}%" if gaps else "-")
        lines.append(f"| {' | '.join([*key, *shown])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="8,20", help=f"of {', '.join(BY_SIZE)}")
    parser.add_argument("--solvers", default=None, help=f"of {', '.join(SOLVERS)}; above 20 GPUs: hexgen2")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--engine", default="vllm", choices=sorted(PROFILES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=None, help="seconds for each plan")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/benchmarks/scheduler.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in args.sizes.split(","):
        names = args.solvers.split(",") if args.solvers else (SOLVERS if int(size) <= 20 else SOLVERS[:1])
        for cluster in BY_SIZE[size]:
            for model in args.models.split(","):
                for workload in args.workloads.split(","):
                    for solver in names:
                        for seed in range(args.seeds):
                            rows.append(run(cluster, model, workload, solver, args, seed))
                            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
