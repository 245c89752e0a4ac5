"""How near plans come to the upper bound, and what the bound is made of: the tables of docs/bound.md.

    python benchmarks/bound.py [--clusters mixed-1,large-64] [--engine vllm] [--json] [-o FILE]

By instance: the plan of the default solver, the bound, the gap, and what the bound would be with less in it:
without links and NICs ("no network"), with parts of groups ("fractional"), stage by stage ("additive"). For
small clusters also what the bound counts on: the groups at which it is reached, valued by the cost model before
("its groups") and after routes share the network ("routed"), and what of that is colocated ("colocated").
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from hexgen2.cost.replica import CostModel
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.scheduler.bound import by_grid, upper_bound
from hexgen2.scheduler.bound.additive import additive_bound
from hexgen2.scheduler.bound.exchange import Exchange
from hexgen2.scheduler.bound.grid import grid_bound
from hexgen2.scheduler.bound.linear import linear_bound
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.columns import Kinds
from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.scheduler.solution import assess
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import load_cluster

CLUSTERS = Path(__file__).parents[1] / "examples" / "clusters"
NAMES = (
    *("homogeneous-8xh100", "mixed-1", "mixed-2", "mixed-3", "mixed-4", "mixed-5"),
    *("large-64", "large-320", "large-1024"),
)
MODELS = ("llama-2-70b", "opt-30b")
WORKLOADS = ("hpld", "hphd", "lphd", "lpld")
COLUMNS = ("no network", "fractional", "additive", "its groups", "routed", "colocated")


def instance(cluster: str, model: str, workload: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row; figures in requests/s."""
    problem = Problem(
        cluster=load_cluster(CLUSTERS / f"{cluster}.yaml"),
        workload=workload,
        lengths=load_workload(workload).representative(256),
        cost=CostModel(load_model(model)),
        engine=PROFILES[args.engine],
    )
    plan = schedule(problem, time_limit_s=args.time_limit)
    evaluator = Evaluator(problem, best_rate)
    began = time.process_time()
    bound = upper_bound(evaluator)
    row: dict[str, Any] = {
        "cluster": cluster,
        "model": model,
        "workload": workload,
        "plan": plan.objective.value,
        "bound": bound.value,
        "gap": bound.value / plan.objective.value - 1,
        "bound_cpu_s": time.process_time() - began,
        "additive": additive_bound(evaluator),
    }
    topology = evaluator.topology
    if by_grid(problem, topology):
        places = Places.of_nodes(topology)
        row["no network"] = grid_bound(problem, topology, Exchange(problem, places, free=True)).value
        row |= _counted_on(evaluator, bound.starts[0])
        if problem.engine.uniform_tp:
            row["fractional"] = linear_bound(problem, places)
        return row
    places = Places.of_kinds(Kinds(topology))
    if problem.engine.uniform_tp:
        row["fractional"] = bound.value
        row["no network"] = linear_bound(problem, places, Exchange(problem, places, free=True))
    return row


def _counted_on(evaluator: Evaluator, cells: Any) -> dict[str, float]:
    """What the groups of a start serve by the cost model, without and with the network."""
    thorough = Evaluator(evaluator.problem, best_rate, thorough=True)
    found = assess(thorough, cells, coupled=True)
    assert found is not None
    network = found.flow.network
    return {"its groups": network.ceiling, "routed": found.value, "colocated": float(network.colocated.sum())}


def table(rows: list[dict[str, Any]]) -> str:
    """A line by instance: the plan, the gap, and the other figures over the plan's."""
    lines = [
        "| cluster | model | workload | plan req/s | gap | " + " | ".join(COLUMNS) + " |",
        "|---" * (5 + len(COLUMNS)) + "|",
    ]
    for row in rows:
        more = [f"{row[name] / row['plan'] - 1:+.1%}" if row.get(name) else "" for name in COLUMNS]
        key = " | ".join(row[name] for name in ("cluster", "model", "workload"))
        lines.append(f"| {key} | {row['plan']:.4g} | {row['gap']:.1%} | {' | '.join(more)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", default=",".join(NAMES))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--engine", default="vllm", choices=sorted(PROFILES))
    parser.add_argument("--time-limit", type=float, default=None, help="seconds for each plan")
    parser.add_argument("--json", action="store_true", help="print one JSON document in place of the table")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/benchmarks/bound.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for cluster in args.clusters.split(","):
        for model in args.models.split(","):
            for workload in args.workloads.split(","):
                rows.append(instance(cluster, model, workload, args))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    document = {"engine": args.engine, "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(json.dumps(document) if args.json else table(rows))


if __name__ == "__main__":
    main()
