"""The shipped example clusters and traces are what their comments say."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hexgen2.specs import load_cluster
from hexgen2.specs.catalog import load_workload

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "examples" / "clusters"

STATED = {
    # price per hour, GPUs by type
    "homogeneous-8xh100": (29.52, {"H100-80G-SXM": 8}),
    "mixed-1": (28.40, {"H100-80G-SXM": 2, "A100-80G-PCIe": 6, "L40": 4, "A6000": 8}),
    "mixed-2": (27.83, {"H100-80G-SXM": 3, "A100-80G-PCIe": 4, "L40": 6, "A6000": 4}),
    "mixed-3": (27.86, {"A100-80G-PCIe": 6, "L40": 10, "A6000": 8}),
    "mixed-4": (28.62, {"H100-80G-SXM": 4, "L40": 8, "A6000": 6}),
    "mixed-5": (20.62, {"A100-80G-PCIe": 4, "L40": 8, "A6000": 6}),
    "h100-and-a6000": (6.85, {"H100-80G-SXM": 1, "A6000": 4}),
    "local-cpu": (0.0, {"cpu-2c-4g": 1, "cpu-1c": 2}),
}
MIXED = [name for name in STATED if name.startswith("mixed")]
LARGE = {"large-64": 64, "large-320": 320, "large-1024": 1024}


def test_every_example_is_in_these_tables() -> None:
    assert {path.stem for path in CLUSTERS.glob("*.yaml")} == {*STATED, *LARGE}


@pytest.mark.parametrize("name", STATED)
def test_price_and_counts(name: str) -> None:
    price, counts = STATED[name]
    cluster = load_cluster(CLUSTERS / f"{name}.yaml")
    assert cluster.name == name
    assert cluster.price_per_hour == pytest.approx(price, abs=0.005)
    assert Counter(gpu.type.name for gpu in cluster.gpus) == counts
    if price:
        text = (CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"${price:.2f}" in text, "the comment states the price"


def test_the_paper_budgets_hold() -> None:
    prices = [STATED[name][0] for name in MIXED]
    assert all(26.3 <= price <= 28.8 for price in prices[:4])
    assert prices[4] == pytest.approx(20.5, abs=0.2)


def test_one_mixed_cluster_has_20_gpus() -> None:
    assert sum(STATED["mixed-1"][1].values()) == 20


@pytest.mark.parametrize("name", MIXED)
def test_mixed_nodes_and_links(name: str) -> None:
    """Nodes of 2 to 4 GPUs; 5 to 100 Gb/s between nodes, not all alike; NICs that bind."""
    cluster = load_cluster(CLUSTERS / f"{name}.yaml")
    assert all(2 <= node.count <= 4 for node in cluster.nodes)
    nodes = range(len(cluster.nodes))
    links = {(a, b): cluster.node_link(a, b).bandwidth for a in nodes for b in nodes if a != b}
    gbps = {round(bandwidth * 8 / 1e9) for bandwidth in links.values()}
    assert len(gbps) >= 3
    assert min(gbps) == 5
    assert max(gbps) <= 100
    binding = [a for a in nodes if cluster.nic_bandwidth(a) < sum(links[a, b] for b in nodes if b != a)]
    assert binding, "some node's links carry more together than its NIC"


@pytest.mark.parametrize("name", LARGE)
def test_large_clusters(name: str) -> None:
    cluster = load_cluster(CLUSTERS / f"{name}.yaml")
    assert len(cluster.gpus) == LARGE[name]
    assert len({gpu.type.name for gpu in cluster.gpus}) >= 4
    assert cluster.bandwidth.shape == (LARGE[name], LARGE[name])
    off_diagonal = cluster.bandwidth[~np.eye(LARGE[name], dtype=bool)]
    assert np.isfinite(off_diagonal).all()
    assert len(np.unique(off_diagonal)) >= 5


def test_large_clusters_are_as_their_script_writes_them() -> None:
    script = runpy.run_path(str(ROOT / "tools" / "large_clusters.py"))
    for recipe in script["RECIPES"]:
        path = script["cluster_path"](recipe)
        assert path.read_text(encoding="utf-8") == script["cluster_text"](recipe), path.name


def test_the_local_test_bed_can_be_served_here() -> None:
    cluster = load_cluster(CLUSTERS / "local-cpu.yaml")
    assert [node.host for node in cluster.nodes] == ["127.0.0.1"] * 3
    assert [node.count for node in cluster.nodes] == [1, 1, 1]
    assert len({gpu.type.name for gpu in cluster.gpus}) == 2


@pytest.mark.parametrize(("name", "requests"), [("sample-azure.csv", 8), ("sample-mooncake.jsonl", 6)])
def test_sample_traces(name: str, requests: int) -> None:
    workload = load_workload(str(ROOT / "examples" / "workloads" / name))
    assert workload.trace is not None
    assert len(workload.trace) == requests
    assert workload.mean_rps is not None
