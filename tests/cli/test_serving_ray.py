"""`serve --launcher ray`: a plan on the unlike nodes of a Ray cluster, one of which dies and comes back."""

from __future__ import annotations

import asyncio
import json
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tests.controller.stand import Load
from tests.unlike_nodes import HOSTS, UnlikeNodes
from tests.waiting import HUNG_S, until

from hexgen2.cli.main import main
from hexgen2.cli.platform import Emulation
from hexgen2.cli.serving import Options, Served, serving
from hexgen2.specs.plan import load_plan
from hexgen2.specs.workload import Lengths

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

CLUSTER = f"""
name: unlike
nodes:
  - {{name: a, gpu: A100-80G-PCIe, count: 2}}
  - {{name: b, gpu: L40, count: 2}}
  - {{name: c, gpu: A100-80G-PCIe, count: 1, host: {HOSTS["c"]}}}
network:
  default: {{gbps: 10, latency_ms: 0.5}}
"""


LENGTHS = Lengths(np.array([300]), np.array([20]))
NODE_S = 3 * HUNG_S
"""Within this Ray notices that a node has died, or starts another and what runs on it."""


def planned(folder: Path, cluster: str = CLUSTER) -> Path:
    """The file of a plan for a cluster file of this text."""
    (folder / "cluster.yaml").write_text(cluster)
    load = ["--model", "llama-2-7b", "--workload", "fixed:300/20", "--solver", "paper"]
    path = folder / "plan.json"
    assert main(["plan", "--cluster", str(folder / "cluster.yaml"), *load, "-o", str(path)]) == 0
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return planned(tmp_path)


def emulated(plan_file: Path, folder: Path, nodes: UnlikeNodes) -> Options:
    """How a plan is served here: on emulated engines, watched by a controller."""
    return Options(
        port=0,
        run_directory=folder / "run",
        source=str(plan_file),
        launcher="ray",
        ray_address=nodes.address,
        emulation=Emulation(),
        replan="on",
    )


def unused(served: Served, groups: set[str]) -> bool:
    """Whether the plan that serves gives nothing to these groups."""
    return all(engine.share == 0 for engine in served.coordinator.config.engines if engine.group_id in groups)


async def test_a_node_dies_under_load_and_comes_back_and_no_request_is_lost(
    plan_file: Path, tmp_path: Path, unlike_nodes: UnlikeNodes
) -> None:
    plan = load_plan(plan_file)
    on_b = {group.id for group in plan.groups if group.gpus[0].startswith("b/")}
    assert len(on_b) == 2
    assert {node for group in plan.groups for node, _, _ in [group.gpus[0].partition("/")]} == {"a", "b", "c"}
    said = StringIO()
    async with serving(plan, emulated(plan_file, tmp_path, unlike_nodes), Console(file=said)) as served:
        hosts = {engine.group_id: engine.url for engine in served.coordinator.config.engines}
        assert all(HOSTS["b"] in hosts[group] for group in on_b)
        load = Load(served.url, LENGTHS, clients=8, model=plan.model)
        async with load.running():
            await load.more()
            await asyncio.to_thread(unlike_nodes.kill, "b")
            await until(lambda: unused(served, on_b), NODE_S)
            await load.more()
            await until(lambda: said.getvalue().count("waits for its node's return") == 2, NODE_S)
            await asyncio.to_thread(unlike_nodes.add, "b")
            await until(lambda: said.getvalue().count("is ready again") == 2, NODE_S)
            await until(lambda: not unused(served, on_b), NODE_S)
            await load.more()
    assert load.lost == []
    decided = [json.loads(line) for line in (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()]
    assert {one["action"] for one in decided} == {"routes"}, "what is left carries this load"


@pytest.mark.slow
async def test_a_group_is_started_elsewhere_when_all_of_its_role_are_lost(
    tmp_path: Path, unlike_nodes: UnlikeNodes
) -> None:
    """One GPU a node: the only decode group's node dies, and what is left serves again."""
    path = planned(tmp_path, CLUSTER.replace("count: 2", "count: 1"))
    plan = load_plan(path)
    (lost,) = plan.role_groups("decode")
    node = lost.gpus[0].partition("/")[0]
    said = StringIO()
    async with serving(plan, emulated(path, tmp_path, unlike_nodes), Console(file=said)) as served:
        clients = Load(served.url, LENGTHS, clients=4, model=plan.model)
        async with clients.running():
            await clients.more()
            await asyncio.to_thread(unlike_nodes.kill, node)
            await until(lambda: unused(served, {lost.id}), NODE_S)
            await clients.more()
            await until(lambda: "started: " in said.getvalue(), NODE_S)
            started = said.getvalue().rpartition("started: ")[2].split()[0].strip(",;")
            await until(lambda: started in served.coordinator.fleet.engines)
            host = served.coordinator.fleet.engines[started].endpoint.url
            assert HOSTS[node] not in host
            assert (tmp_path / "run" / f"{started}.log").read_text()


def test_ray_that_is_not_there_is_one_line(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = ["serve", str(plan_file), "--launcher", "ray", "--port", "0"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        assert main(serve) == 2
    assert "ray: is not installed; run `pip install 'hexgen2[ray]'`" in capsys.readouterr().err
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for address, message in (
        ("127.0.0.1:1", "127.0.0.1:1: nothing listens there; start the cluster's head with `ray start --head`"),
        ("ray://x:1", "is that of a Ray client server"),
    ):
        assert main([*serve, "--ray-address", address]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["serve", str(plan_file), "--ray-address", "x:1"]) == 2
    assert "is for --launcher ray" in capsys.readouterr().err
