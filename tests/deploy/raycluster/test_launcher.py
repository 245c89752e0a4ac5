"""The Ray launcher on a real Ray cluster of unlike nodes, with small fake engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hexgen2.deploy import Deployment, EngineFailed, ProcessSpec
from hexgen2.deploy.ports import is_free
from hexgen2.deploy.raycluster import NodeWatch, RayCluster, RayLauncher, RayPorts, connected
from hexgen2.deploy.raycluster import launcher as module
from hexgen2.specs import InputError
from tests.unlike_nodes import HOSTS, UnlikeNodes
from tests.waiting import HUNG_S, until

from ..builders import cluster
from ..family import Family, deployment, holding

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

CLUSTER = cluster(
    {"name": "a", "gpu": "L40", "count": 2},
    {"name": "b", "gpu": "A6000", "count": 2},
    {"name": "c", "gpu": "cpu-1c", "count": 1, "host": HOSTS["c"]},
)


def placed(family: Family, *where: tuple[str, str, Collection[int]]) -> Deployment:
    """Fake engines as (behaviour, node, devices)."""
    made = deployment(family, *(behaviour for behaviour, _, _ in where))
    return made.model_copy(
        update={
            "processes": tuple(
                spec.model_copy(
                    update={
                        "node": node,
                        "host": HOSTS[node],
                        "gpus": tuple(f"{node}/{device}" for device in devices),
                        "env": {**spec.env, "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))},
                    }
                )
                for spec, (_, node, devices) in zip(made.processes, where, strict=True)
            )
        }
    )


def printing(spec: ProcessSpec, *variables: str) -> ProcessSpec:
    """A process that prints variables and its folder, and stays."""
    program = (
        f"import os, time; print(*(os.environ.get(name) for name in {variables!r}), sorted(os.listdir()), "
        "flush=True); time.sleep(600)"
    )
    return spec.model_copy(update={"argv": (sys.executable, "-c", program), "readiness_url": None})


class Room:
    """A launcher on the cluster, and the node watch that knows where to."""

    def __init__(self, ray: RayCluster, folder: Path, claim: bool = True) -> None:
        self.ray = ray
        self.watch = NodeWatch(ray, CLUSTER)
        self.launcher = RayLauncher(folder, ray, CLUSTER, self.watch, grace_s=0.5, claim=claim)

    def left(self, name: str) -> dict[str, float]:
        """What a node has left."""
        left = self.ray.available()[self.watch.places.found[name].id]
        return {kind: left.get(kind, 0.0) for kind in ("CPU", "GPU")}


@contextmanager
def room(nodes: UnlikeNodes, folder: Path) -> Iterator[Room]:
    with connected(nodes.address) as ray:
        yield Room(ray, folder / "run")


async def test_processes_run_on_their_nodes_with_what_they_claim_and_give_it_back(
    tmp_path: Path, family: Family, unlike_nodes: UnlikeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TEST_CARRIED", "yes")
    plan = placed(
        family, ("family", "a", (0,)), ("slow", "b", (0, 1)), ("silent", "a", (1,)), ("family", "c", (0,))
    )
    told = printing(plan.processes[2], "CUDA_VISIBLE_DEVICES", "VLLM_TEST_CARRIED", "RAY_JOB_ID")
    told = told.model_copy(update={"files": {"x.json": "{}"}})
    plan = plan.model_copy(update={"processes": (*plan.processes[:2], told, plan.processes[3])})
    with room(unlike_nodes, tmp_path) as here:
        async with here.launcher as launcher:
            await launcher.start(plan)
            await launcher.wait_ready(60)
            # Ray's word on what is left comes later than what it gives.
            await until(lambda: here.left("a") == {"CPU": 2.0, "GPU": 0.0})
            await until(lambda: here.left("b") == {"CPU": 2.0, "GPU": 0.0})
            await until(lambda: here.left("c") == {"CPU": 0.0, "GPU": 0.0})
            log = tmp_path / "run" / "e2.log"
            await until(lambda: log.exists() and log.read_text().count("\n") > 0)
            device, carried, job, *files = log.read_text().split(maxsplit=3)
            assert device in ("0", "1"), "Ray chooses among GPUs that are alike"
            assert (carried, job, *files) == ("yes", "None", "['x.json']\n")
            await until(lambda: "starting" in (tmp_path / "run" / "e3.log").read_text())
            await asyncio.to_thread(family.wait_for, 7)
            assert len(family.alive()) == 7
        assert not family.alive()
        await until(lambda: here.left("a")["GPU"] == 2.0 and here.left("c")["CPU"] == 1.0)


async def test_a_group_over_two_nodes_dies_and_starts_as_a_whole(
    tmp_path: Path, family: Family, unlike_nodes: UnlikeNodes
) -> None:
    plan = placed(family, ("family", "a", (0,)), ("!silent", "b", (0,)), ("dies", "c", (0,)))
    head, rank, other = plan.processes
    rank = rank.model_copy(update={"group_id": "e0"})
    with room(unlike_nodes, tmp_path) as here:
        async with here.launcher as launcher:
            await launcher.start(plan.model_copy(update={"processes": (head, rank, other)}))
            with pytest.raises(
                EngineFailed, match=r"engine e2 ended \(exit code 3\)\n  ValueError: no such model"
            ):
                await launcher.wait_ready(60)
            await launcher.wait_ready(60, groups=("e0",))
            first = family.alive()[0]  # e0's or e1's own process: their children come later, e2 is gone
            os.kill(first, signal.SIGSEGV)
            gone = await asyncio.wait_for(launcher.watch("e0"), HUNG_S)
            assert gone.process in ("e0", "e1")
            await launcher.end_group("e0")
            assert not family.alive()
            await launcher.start_group("e0")
            await launcher.wait_ready(60, groups=("e0",))
            assert launcher.log_of("e0").name == "e0.again1.log"
            await until(lambda: "starting" in launcher.log_of("e0").read_text())
            await until(lambda: len(family.alive()) == 4)
    assert not family.alive()


async def test_what_somebody_else_holds_is_told_and_nothing_is_left(
    tmp_path: Path, family: Family, unlike_nodes: UnlikeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = placed(family, ("family", "a", (0,)), ("family", "b", (0, 1)))
    with room(unlike_nodes, tmp_path) as here:
        from ray.util import placement_group, remove_placement_group

        held = placement_group([{"GPU": 1, "hexgen2-node:b": 1}])
        assert held.wait(HUNG_S)
        starting = asyncio.create_task(here.launcher.start(plan))
        await until(lambda: here.left("b")["GPU"] == 1.0 and here.left("a")["GPU"] == 1.0)
        monkeypatch.setattr(module, "PLACE_S", 0.0)  # long enough: the other group has its place
        with pytest.raises(
            InputError, match=r"node b: has 1 GPUs free in Ray, and e1 needs 2; end what holds them"
        ):
            await starting
        remove_placement_group(held)
        await until(lambda: here.left("a")["GPU"] == 2.0)
        absent = [spec.model_copy(update={"node": "d"}) for spec in plan.processes]
        here.watch.places = here.watch.places.__class__({}, {"d": ("is not in the Ray cluster", "start it")})
        with pytest.raises(InputError, match="node d: is not in the Ray cluster"):
            await here.launcher.start(plan.model_copy(update={"processes": tuple(absent)}))
    assert not family.alive()


@pytest.mark.slow  # `tests/cli/test_serving_ray.py` goes the same way in every run
async def test_a_node_that_dies_is_noticed_and_its_group_starts_again_when_it_is_back(
    tmp_path: Path, family: Family, unlike_nodes: UnlikeNodes
) -> None:
    plan = placed(family, ("family", "a", (0,)), ("stubborn", "b", (0,)))
    with room(unlike_nodes, tmp_path) as here:
        looking = asyncio.create_task(here.watch.run())
        async with here.launcher as launcher:
            await launcher.start(plan)
            await launcher.wait_ready(60)
            family.wait_for(8)
            assert here.watch.states() == {"a": True, "b": True, "c": True}
            await asyncio.to_thread(unlike_nodes.kill, "b")
            gone = await asyncio.wait_for(launcher.watch("e1"), HUNG_S)
            assert str(EngineFailed.exited(gone)).startswith(
                f"engine e1 is lost\n  node b ({HOSTS['b']}) does not answer\n"
            )
            assert launcher.absent("e1") == {"b"}
            assert here.watch.states() == {"a": True, "b": False, "c": True}
            await until(
                lambda: len(family.alive()) == 3, 20
            )  # the guard ended the engine, stubborn children too
            await launcher.end_group("e1")
            await asyncio.to_thread(unlike_nodes.add, "b")
            await until(lambda: not launcher.absent("e1"))
            await launcher.start_group("e1")
            await launcher.wait_ready(60)
        looking.cancel()
    assert not family.alive()


def test_nothing_outlives_the_driver(tmp_path: Path, family: Family, unlike_nodes: UnlikeNodes) -> None:
    """The driver is killed: Ray ends its actors, and the guards notice."""
    plan = placed(family, ("family", "a", (0,)), ("stubborn", "c", (0,)))
    (tmp_path / "deployment.json").write_text(plan.model_dump_json())
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER.document()))
    program = textwrap.dedent(
        f"""
        import asyncio, json
        from pathlib import Path
        from hexgen2.deploy import Deployment
        from hexgen2.deploy.raycluster import NodeWatch, RayLauncher, connected
        from hexgen2.specs.cluster import parse_cluster

        async def main():
            here = Path({str(tmp_path)!r})
            cluster = parse_cluster(json.loads((here / "cluster.json").read_text()), "")
            with connected({unlike_nodes.address!r}) as ray:
                watch = NodeWatch(ray, cluster)
                async with RayLauncher(here / "run", ray, cluster, watch, grace_s=0.5) as launcher:
                    text = (here / "deployment.json").read_text()
                    await launcher.start(Deployment.model_validate_json(text))
                    await launcher.wait_ready(60)
                    print("ready", flush=True)
                    await launcher.watch()

        asyncio.run(main())
        """
    )
    with holding(program, family, 8) as holder:
        holder.kill()
        holder.wait(HUNG_S)
        assert family.gone(), f"left: {family.alive()}"


def test_ports_come_from_the_nodes(unlike_nodes: UnlikeNodes) -> None:
    with connected(unlike_nodes.address) as ray:
        watch = NodeWatch(ray, CLUSTER)
        ports = RayPorts(ray)
        ports.survey(list(watch.places.found.values()), {}, transfers=True)
        for host in HOSTS.values():
            given = [ports(host) for _ in range(20)]  # more than are asked for at a time
            assert len(set(given)) == 20
            assert all(is_free(host, port) for port in given)
        node = watch.places.found["a"]
        with pytest.raises(InputError, match=r"ray: node a: engine: vllm.*pip"):
            ports.survey([node], {node.id: {"nvidia"}}, transfers=True)
