"""Nodes of a Ray cluster and the links between them."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from hexgen2.calibrate.links import LinkFit
from hexgen2.cli.main import main
from hexgen2.deploy.raycluster import connected
from hexgen2.probe import cluster_text
from hexgen2.probe.found import Found, FoundNode, FoundType
from hexgen2.probe.over_ray import Asked, probe_cluster, together, unique
from hexgen2.specs import load_cluster, parse_cluster
from hexgen2.specs.errors import InputError
from tests.unlike_nodes import HOSTS, UnlikeNodes

NOW = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
CPU = {
    "name": "cpu-probed",
    "vendor": "cpu",
    "generation": "x86_64",
    "memory_gib": 2.0,
    "dense_tflops": 0.1,
    "dense_dtype": "fp32",
    "memory_bandwidth_gb_s": 20.0,
    "link": {"kind": "loopback", "gb_s": 2.0, "latency_us": 10.0},
}


def machine(name: str, *gpus: str, count: int = 2, tflops: float = 0.1) -> Found:
    """A machine with a node for each type."""
    nodes = tuple(
        FoundNode(
            {
                "name": name if len(gpus) == 1 else f"cpu-{chr(97 + place)}",
                "gpu": gpu,
                "count": count,
                "host": f"host-of-{name}",
            },
            (f"found on {name}",),
        )
        for place, gpu in enumerate(gpus)
    )
    types = (FoundType({**CPU, "dense_tflops": tflops}),) if "cpu-probed" in gpus else ()
    link = {"gbps": 20.0, "latency_ms": 0.01} if len(gpus) > 1 else None
    return Found(name, nodes, types, link, ("measured inside",) if link else ())


def fit(gbps: float, error: float = 0.01) -> LinkFit:
    return LinkFit(gbps / 8e-9, 1e-4, error)


def test_machines_are_put_together_with_their_links() -> None:
    measured = {("a", "b"): fit(10.0), ("a", "c"): fit(5.0, error=0.4), ("b", "c"): fit(40.0)}
    machines = [machine("a", "L40"), machine("b", "A6000"), machine("c", "H100-80G-SXM")]
    found = together("three", machines, measured, "nixl")
    cluster = parse_cluster(found.document(), "test")
    assert [(node.name, node.host, node.nic_gbps) for node in cluster.nodes] == [
        ("a", "host-of-a", 10.0),
        ("b", "host-of-b", 40.0),
        ("c", "host-of-c", 40.0),
    ]
    assert cluster.node_link(0, 2).bandwidth == pytest.approx(5e9 / 8)
    assert cluster.node_link(0, 1).latency == pytest.approx(1e-4)
    text = cluster_text(found, NOW, "1")
    assert "# Probed on 2026-01-02 03:04 UTC" in text
    assert "over NIXL, each way" in text
    assert "    # a - c: the fit's median error is 40%" in text
    assert text.index("# a - c") < text.index("between: [a, c]") < text.index("between: [b, c]")


def test_types_of_one_name_but_other_figures_stay_apart(tmp_path: Path) -> None:
    """Two CPU machines of two devices each, and one that is as the first."""
    machines = [
        machine("x", "cpu-probed", "cpu-probed", count=1),
        machine("y", "cpu-probed", "cpu-probed", count=1, tflops=0.2),
        machine("z", "cpu-probed", count=1),
    ]
    pairs = {("x", "y"): fit(1.0), ("x", "z"): fit(2.0), ("y", "z"): fit(3.0)}
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster_text(together("cpus", machines, pairs, "tcp"), NOW, "1"))
    cluster = load_cluster(path)
    assert [(node.name, node.gpu, node.nic_gbps) for node in cluster.nodes] == [
        ("x-cpu-a", "cpu-probed", None),
        ("x-cpu-b", "cpu-probed", None),
        ("y-cpu-a", "cpu-probed-y", None),
        ("y-cpu-b", "cpu-probed-y", None),
        ("z", "cpu-probed", 3.0),
    ]
    assert [kind.name for kind in cluster.inline_types] == ["cpu-probed", "cpu-probed-y"]
    assert len(cluster.network.links) == 10
    inside, across = cluster.node_link(0, 1), cluster.node_link(1, 2)
    assert (inside.bandwidth, across.bandwidth) == pytest.approx((20e9 / 8, 1e9 / 8))


def test_one_machine_needs_no_links() -> None:
    found = together("one", [machine("a", "L40")], {}, "tcp")
    assert "network" not in found.document()
    assert parse_cluster(found.document(), "test").nodes[0].nic_gbps is None


def test_names_are_made_unique() -> None:
    assert unique(["a", "a", "a-2", "b", "a"]) == ["a", "a-2", "a-2-2", "b", "a-3"]


@pytest.mark.ray
def test_unlike_nodes_are_described_and_their_links_measured(unlike_nodes: UnlikeNodes) -> None:
    told: list[str] = []
    with connected(unlike_nodes.address) as ray:
        asked = Asked("cpu", cpu_devices=1, sizes=(4096, 1 << 20))
        found = probe_cluster(ray, asked, told.append)
        with pytest.raises(InputError, match=r"ray: node a: --devices: gpu: .* no NVIDIA GPU"):
            probe_cluster(ray, Asked(), told.append)
    cluster = parse_cluster(found.document(), "test")
    assert {(node.name, node.host) for node in cluster.nodes} >= {("a", HOSTS["a"]), ("b", HOSTS["b"])}
    assert {node.host for node in cluster.nodes} == set(HOSTS.values())
    assert len(cluster.network.links) == 3
    assert all(link.gbps > 0 and link.latency_ms > 0 for link in cluster.network.links)
    assert sum("has no CPUs for Ray: left out" in line for line in told) == 1, "the head"
    assert sum("link 3 of 3" in line for line in told) == 1
    assert sum("has no GPUs for Ray: left out" in line for line in told) == 2


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--transport", "tcp"], "--transport: tcp: is for --ray"),
        (["--ray", "auto", "--host", "x"], "--host: x: is not for --ray"),
    ):
        assert main(["probe", *options, "-o", str(tmp_path / "c.yaml")]) == 2
        assert message in capsys.readouterr().err
