"""A node of a Ray cluster dies under load and comes back: what is lost, and when a new plan stands.

    python -m benchmarks.ray_node_loss [-o build/ray_node_loss.json]

Three unlike nodes (ray.cluster_utils, each at an address of its own on this machine), emulated engines with the
cost model's times, `serve --launcher ray --replan on`, and clients that always have a request under way. In the
first case the other nodes carry the load: new routes suffice. In the second, all of one role was on the node,
so that a group has to be started elsewhere.

Needs the ray extra and about two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Collection
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from tests.unlike_nodes import HOSTS, UnlikeNodes

from hexgen2.cli.platform import Emulation
from hexgen2.cli.serving import Options, Served, serving
from hexgen2.cost import CostModel
from hexgen2.deploy import used_nodes
from hexgen2.loadgen.client import Load, measure
from hexgen2.scheduler import Problem, engine_profile, schedule
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.plan import Plan

MODEL, WORKLOAD = "llama-2-7b", "fixed:300/20"
CASES = {
    "the rest carries it": {"a": ("A100-80G-PCIe", 2), "b": ("L40", 2), "c": ("A100-80G-PCIe", 1)},
    "a role is lost": {"a": ("A100-80G-PCIe", 1), "b": ("L40", 1), "c": ("A100-80G-PCIe", 1)},
}


def cluster_of(case: str) -> Cluster:
    nodes = [
        {"name": name, "gpu": gpu, "count": count, "host": HOSTS[name]}
        for name, (gpu, count) in CASES[case].items()
    ]
    network = {"default": {"gbps": 10, "latency_ms": 0.5}}
    return parse_cluster({"name": "unlike", "nodes": nodes, "network": network}, case)


def planned(cluster: Cluster) -> Plan:
    workload = load_workload(WORKLOAD)
    cost = CostModel(load_model(MODEL))
    problem = Problem(
        cluster, WORKLOAD, workload.representative(), cost, engine_profile("vllm"), model_name=MODEL
    )
    return schedule(problem, solver="paper")


def node_to_lose(plan: Plan, whole_role: bool) -> str:
    """A node without which a path is left, or with all groups of a role on it."""
    at = {group.id: group.gpus[0].rpartition("/")[0] for group in plan.groups}
    for node in sorted(used_nodes(plan)):
        roles = {group.role for group in plan.groups if at[group.id] != node}
        if (roles >= {"prefill", "decode"}) != whole_role:
            return node
    raise SystemExit("the plan has no such node")


async def eventually(condition: Callable[[], bool], within_s: float = 90.0) -> float:
    began = time.perf_counter()
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return time.perf_counter() - began


def stands(served: Served, lost: Collection[str]) -> bool:
    """A plan serves that does without the lost groups, and has a path."""
    config = served.coordinator.config
    shares = {engine.group_id: engine.share for engine in config.engines}
    alive = served.coordinator.fleet.engines
    used = [group for group, share in shares.items() if share > 0]
    return bool(used) and all(group not in lost and alive[group].up for group in used)


async def case(name: str, nodes: UnlikeNodes, clients: int) -> dict[str, Any]:
    plan = planned(cluster_of(name))
    node = node_to_lose(plan, whole_role=name != "the rest carries it")
    lost = {group.id for group in plan.groups if group.gpus[0].startswith(f"{node}/")}
    said = StringIO()
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            port=0,
            run_directory=Path(folder),
            launcher="ray",
            ray_address=nodes.address,
            emulation=Emulation(),
            replan="on",
        )
        async with serving(plan, options, Console(file=said)) as served:
            load = Load(served.url, load_workload(WORKLOAD), requests=clients * 60, concurrency=clients)
            measuring = asyncio.create_task(measure(load, Console(file=StringIO())))
            await asyncio.sleep(5.0)
            await asyncio.to_thread(nodes.kill, node)
            stood_s = await eventually(lambda: stands(served, lost))
            await asyncio.sleep(8.0)
            await asyncio.to_thread(nodes.add, node)
            ready = len(lost)
            back_s = await eventually(
                lambda: said.getvalue().count("is ready again") >= ready or measuring.done()
            )
            results = await measuring
        decisions = [json.loads(line) for line in (Path(folder) / "decisions.jsonl").read_text().splitlines()]
    return {
        "case": name,
        "groups": {group.id: group.gpus for group in plan.groups},
        "lost": sorted(lost),
        "new_plan_s": round(stood_s, 2),
        "back_s": round(back_s, 2),
        "actions": [one["action"] for one in decisions if one["action"] != "keep"],
        "requests": results["requests"],
        "failed": results["failed"],
        "e2e_s": results["e2e_s"],
    }


async def run(clients: int) -> list[dict[str, Any]]:
    nodes = UnlikeNodes()
    try:
        return [await case(name, nodes, clients) for name in CASES]
    finally:
        nodes.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    found = asyncio.run(run(args.clients))
    text = json.dumps(found, indent=2)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
