"""The simulator against the emulator behind the real coordinator: the same plans, requests and arrival times.

    python benchmarks/emulated.py [--cluster FILE] [--model M] [--workload W] [--solver S... | --plan FILE]
                                  [--loads 0.5 0.8 1.2] [--requests 400] [--slowdown 5] [--json FILE]

Two plans by default, the paper's solver's, which splits prefill and decode, and ours, which on this instance
has colocated pipelines. For each load (a part of the plan's throughput) `serve --engine emulated` is started,
and the client of `bench` sends the requests that the simulator is given too. Both take their times from one
cost model; what differs is the rest: HTTP, the coordinator's routing and holding back, and that an emulated
engine goes step by step. `--slowdown` makes every emulated second longer, so that two cores keep up with the
tokens; the figures are divided by it. Prints throughput (completed requests over the time from the first
arrival to the last end), TTFT and TPOT of both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hexgen2.cost import CostModel
from hexgen2.loadgen.client import Load, measure
from hexgen2.scheduler import Problem, engine_profile, schedule
from hexgen2.simulator import Requests, simulate
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import load_cluster
from hexgen2.specs.plan import Plan, load_plan

ROOT = Path(__file__).parent.parent
FIGURES = (
    ("throughput_rps", None, "requests/s"),
    ("ttft_s", "p50", "TTFT P50, s"),
    ("ttft_s", "p99", "TTFT P99, s"),
    ("tpot_s", "p50", "TPOT P50, s"),
    ("tpot_s", "p99", "TPOT P99, s"),
    ("e2e_s", "mean", "E2E mean, s"),
)


def planned(arguments: argparse.Namespace, solver: str) -> Plan:
    model = load_model(arguments.model)
    problem = Problem(
        cluster=load_cluster(arguments.cluster),
        workload=arguments.workload,
        lengths=load_workload(arguments.workload).representative(256),
        cost=CostModel(model),
        engine=engine_profile("vllm"),
        model_name=arguments.model,
    )
    return schedule(problem, solver=solver)


@contextmanager
def served(plan_file: Path, slowdown: float) -> Iterator[str]:
    """The URL of the plan's coordinator before emulated engines."""
    command = [sys.executable, "-m", "hexgen2.cli.main", "serve", str(plan_file), "--engine", "emulated"]
    command += ["--port", "0", "--json", "--slowdown", str(slowdown), "--run-directory", str(plan_file.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            text = ""
            for line in process.stdout:
                text += line
                if line.startswith("}"):
                    break
            if not text:
                sys.exit("serve did not start")
            yield str(json.loads(text)["url"])
        finally:
            process.terminate()
            process.wait(30)


def requests_of(workload: str, count: int, rate: float, seed: int) -> Requests:
    """The lengths and gaps that `hexgen2 bench` draws for this seed, at the rate before the slowdown."""
    rng = np.random.default_rng(seed)
    lengths = load_workload(workload).sample(count, rng)
    arrivals = np.cumsum(rng.exponential(1 / rate, size=count))
    return Requests(arrivals - arrivals[0], lengths.inputs, lengths.outputs)


def compare(plan: Plan, load: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Simulated and emulated figures at one load, in seconds of the cost model."""
    slowdown, rate = arguments.slowdown, load * plan.throughput_rps
    requests = requests_of(plan.workload, arguments.requests, rate, arguments.seed)
    simulated = simulate(plan, CostModel(load_model(plan.model)), requests).document()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(json.dumps(plan.document()))
        with served(file, slowdown) as url:
            workload = load_workload(plan.workload)
            ask = Load(url, workload, arguments.requests, rate_rps=rate / slowdown, seed=arguments.seed)
            emulated = asyncio.run(measure(ask, Console(stderr=True, quiet=True)))
    duration = emulated["duration_s"] - first_gap(plan.workload, arguments, rate / slowdown)
    emulated["throughput_rps"] = emulated["completed"] / duration * slowdown
    rows = []
    for key, part, name in FIGURES:
        one = simulated[key] if part is None else simulated[key][part]
        two = emulated[key] if part is None else emulated[key][part] / slowdown
        rows.append({"figure": name, "simulated": one, "emulated": two, "difference": two / one - 1})
    return {"load": load, "rate_rps": rate, "failed": emulated["failed"], "figures": rows}


def on_plan(plan: Plan, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The comparisons of a plan, printed as they are made."""
    where = f"{plan.model} on {plan.cluster.name}, {plan.workload}, {plan.solver}"
    print(f"{where}: {plan.throughput_rps:.4g} requests/s", flush=True)
    results = []
    for load in arguments.loads:
        result = compare(plan, load, arguments)
        results.append(result)
        print(f"load {load:.0%}, {result['rate_rps']:.4g} requests/s offered, {result['failed']} failed")
        for row in result["figures"]:
            print(
                f"  {row['figure']:12} simulated {row['simulated']:9.4g}   emulated {row['emulated']:9.4g}"
                f"   {row['difference']:+.1%}",
                flush=True,
            )
    return results


def first_gap(workload: str, arguments: argparse.Namespace, rate: float) -> float:
    """Seconds that the client waits before its first request, which is no time of serving."""
    rng = np.random.default_rng(arguments.seed)
    load_workload(workload).sample(arguments.requests, rng)
    return float(rng.exponential(1 / rate))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", help="a plan file, in place of the next four")
    parser.add_argument("--cluster", default=str(ROOT / "examples" / "clusters" / "mixed-1.yaml"))
    parser.add_argument("--model", default="llama-2-70b")
    parser.add_argument("--workload", default="lpld")
    parser.add_argument("--solver", nargs="+", default=["paper", "hexgen2"], help="a plan of each")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 1.2])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--slowdown", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(argv)
    plans = [load_plan(arguments.plan)] if arguments.plan else []
    plans = plans or [planned(arguments, solver) for solver in arguments.solver]
    documents = [{"solver": plan.solver, "loads": on_plan(plan, arguments)} for plan in plans]
    if arguments.json:
        arguments.json.write_text(json.dumps(documents, indent=1) + "\n")


if __name__ == "__main__":
    main()
