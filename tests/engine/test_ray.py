"""Real engines on a Ray cluster of unlike nodes, one of which dies under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hexgen2.cli.main import main
from hexgen2.cli.serving import Options, Served, serving
from hexgen2.specs import load_cluster
from hexgen2.specs.plan import Plan, load_plan
from hexgen2.specs.workload import Lengths
from tests.controller.stand import Load
from tests.deploy.builders import cluster, group, plan
from tests.unlike_nodes import HOSTS, UnlikeNodes
from tests.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.ray]


async def more(load: Load, count: int = 12) -> None:
    """So many more answers, and nothing lost."""
    answered = len(load.answered)
    await until(lambda: bool(load.lost) or len(load.answered) >= answered + count, 120)
    assert load.lost == []


@asynccontextmanager
async def served_on(
    nodes: UnlikeNodes, what: Plan, folder: Path, said: StringIO
) -> AsyncIterator[tuple[Served, Load]]:
    """The plan served, and four clients that ask all the time."""
    options = Options(port=0, run_directory=folder / "run", launcher="ray", ray_address=nodes.address)
    async with serving(what, options, Console(file=said)) as served:
        load = Load(served.url, Lengths(np.array([40]), np.array([16])), clients=4, model="tiny-llama")
        async with load.running():
            await more(load)
            yield served, load


async def test_from_bare_nodes_to_a_served_plan_that_loses_a_node_and_no_request(
    tmp_path: Path, unlike_nodes: UnlikeNodes
) -> None:
    """Probe, plan, serve, with no file written by hand."""
    cluster_file, plan_file = tmp_path / "cluster.yaml", tmp_path / "plan.json"
    probe = ["probe", "--ray", unlike_nodes.address, "--cpu-devices", "1", "-o", str(cluster_file)]
    assert main(probe) == 0
    text = cluster_file.read_text()
    assert "# Probed on " in text
    assert "# Links between machines were measured" in text
    assert {node.host for node in load_cluster(cluster_file).nodes} == set(HOSTS.values())
    workload = ["--model", "tiny-llama", "--workload", "fixed:40/16", "--solver", "paper"]
    assert main(["plan", "--cluster", str(cluster_file), *workload, "-o", str(plan_file)]) == 0
    made = load_plan(plan_file)
    # The other two still have a whole path without this one.
    role = next(role for role in ("prefill", "decode") if len(made.role_groups(role)) == 2)
    lost = made.role_groups(role)[0]
    node = lost.gpus[0].rpartition("/")[0]
    host = next(one.host for one in made.cluster.nodes if one.name == node)
    said = StringIO()
    async with served_on(unlike_nodes, made, tmp_path, said) as (served, load):
        assert await served.kv_bytes() > 0
        await asyncio.to_thread(unlike_nodes.kill, next(name for name in HOSTS if HOSTS[name] == host))
        await until(lambda: not served.coordinator.fleet.engines[lost.id].up)
        await more(load)
        await until(lambda: f"{lost.id} waits for its node's return" in said.getvalue())
        await more(load)
    assert load.lost == []


@pytest.mark.slow
async def test_a_group_over_two_nodes_falls_and_rises_with_them(
    tmp_path: Path, unlike_nodes: UnlikeNodes
) -> None:
    """A pipeline of vLLM's multi-node executor, each stage on a node of its own."""
    devices = cluster(
        ("a", "cpu-1c", 1), ("b", "cpu-1c", 1), {"name": "c", "gpu": "cpu-1c", "count": 1, "host": HOSTS["c"]}
    )
    groups = [
        group("c0", "colocated", (["a/0"], 3), (["b/0"], 5), share=0.5),
        group("c1", "colocated", (["c/0"], 8), share=0.5),
    ]
    made = plan(devices, groups, model="tiny-llama")
    said = StringIO()
    async with served_on(unlike_nodes, made, tmp_path, said) as (served, load):
        await asyncio.to_thread(unlike_nodes.kill, "b")
        await until(lambda: "c0 waits for its node's return" in said.getvalue())
        await more(load)
        await asyncio.to_thread(unlike_nodes.add, "b")
        await until(lambda: "c0 is ready again" in said.getvalue(), 240)
        await until(lambda: served.coordinator.fleet.engines["c0"].up)
        await more(load)
    assert load.lost == []
