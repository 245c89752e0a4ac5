"""Which Ray node is which node of a plan, and what processes take of it."""

from __future__ import annotations

import pytest

from hexgen2.deploy.raycluster import RayNode, places
from hexgen2.deploy.raycluster.nodes import claims, living
from hexgen2.specs import Cluster, InputError

from ..builders import cluster


def node(number: int, *names: str, address: str | None = None, **resources: float) -> RayNode:
    return RayNode(
        f"id{number}", address or f"10.0.0.{number}", f"host{number}", frozenset(names), dict(resources)
    )


PLAN = cluster(
    {"name": "a", "gpu": "L40", "count": 2},
    {"name": "b", "gpu": "L40", "count": 1, "host": "10.0.0.2"},
    {"name": "c", "gpu": "L40", "count": 1, "host": "host3"},
    {"name": "d", "gpu": "L40", "count": 1, "host": "127.0.0.1"},
)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node(1, "a"), node(2), node(3), node(4)], {"a": "id1", "b": "id2", "c": "id3", "d": "id4"}),
        ([node(1, "a", "d"), node(9, "b")], {"a": "id1", "b": "id9", "d": "id1"}),  # names before addresses
        ([node(1, "a"), node(2, "b", address="10.0.0.1")], {"a": "id1", "b": "id2"}),
        ([node(1), node(5)], {}),  # a host name is no node name
        ([node(1, "a"), node(2, "a")], {"b": "id2"}),  # twice the same name
        ([node(1, "a"), node(2), node(7, address="10.0.0.2")], {"a": "id1"}),  # twice the same address
    ],
)
def test_nodes_are_found_by_name_then_by_address(nodes: list[RayNode], expected: dict[str, str]) -> None:
    found = places(PLAN, nodes, own="id4").found
    assert {name: at.id for name, at in found.items()} == expected


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [node(2)],
            r"ray: node a: is not in the Ray cluster \(nodes: 10\.0\.0\.2\); start it with .*a",
        ),
        ([], r"node a: is not in the Ray cluster \(nodes: none\)"),
        (
            [node(1, "a"), node(8, "a")],
            r"node a: is 2 nodes .* \(10\.0\.0\.1 and 10\.0\.0\.8\); give the label to",
        ),
    ],
)
def test_a_missing_node_is_one_line_with_its_name_and_the_mend(nodes: list[RayNode], message: str) -> None:
    with pytest.raises(InputError, match=message):
        places(PLAN, nodes).require(["a"])


def test_what_ray_says_about_its_nodes_is_read() -> None:
    raw = {
        "NodeID": "id1",
        "Alive": True,
        "NodeManagerAddress": "10.0.0.1",
        "NodeManagerHostname": "gpu_7.rack.example",
        "Resources": {"CPU": 2.0, "hexgen2-node:x": 1.0, "hexgen2-node:y": 1.0},
        "Labels": {"hexgen2-node": "z"},
    }
    (found,) = living([raw, {**raw, "NodeID": "id2", "Alive": False}])
    assert (found.id, found.address, found.names) == ("id1", "10.0.0.1", frozenset("xyz"))
    assert node(1, "b", "a").title == "a"
    (plain,) = living([{**raw, "Resources": {}, "Labels": {}}])
    assert plain.title == "gpu-7"


CPUS: Cluster = cluster(
    *({"name": name, "gpu": "cpu-1c", "count": 1, "host": "10.0.0.1"} for name in ("x", "y", "z"))
)


@pytest.mark.parametrize(
    ("of", "found", "node_name", "gpus", "expected"),
    [
        (PLAN, {"a": node(1, GPU=2.0)}, "a", ["a/0"], {"GPU": 1.0}),
        (PLAN, {"a": node(1, GPU=8.0)}, "a", ["a/0", "a/1"], {"GPU": 2.0}),
        (PLAN, {"a": node(1, GPU=3.0), "b": node(1, GPU=3.0)}, "b", ["b/0"], {"GPU": 1.0}),
        (CPUS, dict.fromkeys("xyz", node(1, CPU=8.0)), "y", ["y/0"], {"CPU": 1.0}),
        (CPUS, dict.fromkeys("xyz", node(1, CPU=2.0)), "y", ["y/0"], {"CPU": 0.6666}),
    ],
)
def test_claims(
    of: Cluster, found: dict[str, RayNode], node_name: str, gpus: list[str], expected: dict[str, float]
) -> None:
    assert claims(of, found, node_name, gpus) == expected


MIXED = cluster(("a", "L40", 1), ("b", "A6000", 1))


@pytest.mark.parametrize(
    ("of", "found", "message"),
    [
        (
            PLAN,
            {"a": node(1, GPU=1.0)},
            r"node a: has 2 GPUs in the plan and 1 in Ray \(10\.0\.0\.1\); start it",
        ),
        (PLAN, {"a": node(1, GPU=2.0), "b": node(1, GPU=2.0)}, "node a: has 3 GPUs in the plan and 2 in Ray"),
        (
            MIXED,
            {"a": node(1, GPU=2.0), "b": node(1, GPU=2.0)},
            "node a: shares its Ray node with b, .* A6000 from",
        ),
    ],
)
def test_what_ray_cannot_give(of: Cluster, found: dict[str, RayNode], message: str) -> None:
    with pytest.raises(InputError, match=message):
        claims(of, found, "a", ["a/0"])
    with pytest.raises(InputError, match="has no CPUs in Ray"):
        claims(CPUS, {"x": node(1, GPU=1.0)}, "x", ["x/0"])
