"""Links between GPUs: inside a node, between nodes, and the NICs that cap them."""

from __future__ import annotations

import numpy as np
import pytest

from hexgen2.specs import Cluster, Link, parse_cluster, weakest
from hexgen2.specs.catalog import gpu_type

GBPS = 1e9 / 8


@pytest.fixture
def cluster() -> Cluster:
    """a: 2 H100, NIC 40; b: 3 A6000 with a bridge of 450 Gb/s; c: 1 T4, NIC 5. a–b 100 Gb/s, else 10."""
    return parse_cluster(
        {
            "nodes": [
                {"name": "a", "gpu": "H100-80G-SXM", "count": 2, "nic_gbps": 40},
                {
                    "name": "b",
                    "gpu": "A6000",
                    "count": 3,
                    "intra_link": {"gbps": 450, "latency_ms": 0.003},
                    "price_per_gpu_hour": 0.5,
                },
                {"name": "c", "gpu": "T4", "count": 1, "nic_gbps": 5},
            ],
            "network": {
                "default": {"gbps": 10, "latency_ms": 1},
                "links": [{"between": ["b", "a"], "gbps": 100, "latency_ms": 0.1}],
            },
        },
        "test",
    )


def test_gpus_are_numbered_node_by_node(cluster: Cluster) -> None:
    assert [gpu.id for gpu in cluster.gpus] == ["a/0", "a/1", "b/0", "b/1", "b/2", "c/0"]
    assert [gpu.index for gpu in cluster.gpus] == list(range(6))
    assert [gpu.node for gpu in cluster.gpus] == [0, 0, 1, 1, 1, 2]
    assert cluster.first_gpu(2) == 5
    assert cluster.gpu_by_id["b/1"].type is gpu_type("A6000")


@pytest.mark.parametrize(
    ("pair", "gbps", "latency"),
    [
        ((0, 1), 3600, 3e-6),  # the type's NVLink: 450 GB/s
        ((2, 4), 450, 3e-6),  # the node's own bridge
        ((0, 2), 40, 1e-4),  # 100 Gb/s, capped by a's NIC
        ((2, 0), 40, 1e-4),
        ((0, 5), 5, 1e-3),  # the default of 10, capped by c's NIC
        ((3, 5), 5, 1e-3),
    ],
)
def test_links(cluster: Cluster, pair: tuple[int, int], gbps: float, latency: float) -> None:
    link = cluster.link(*pair)
    assert link.bandwidth == pytest.approx(gbps * GBPS)
    assert link.latency == pytest.approx(latency)
    assert cluster.bandwidth[pair] == link.bandwidth
    assert cluster.latency[pair] == link.latency


def test_the_matrices_are_symmetric_and_fixed(cluster: Cluster) -> None:
    assert np.array_equal(cluster.bandwidth, cluster.bandwidth.T)
    assert np.array_equal(cluster.latency, cluster.latency.T)
    assert np.isinf(np.diag(cluster.bandwidth)).all()
    assert not np.diag(cluster.latency).any()
    with pytest.raises(ValueError, match="read-only"):
        cluster.bandwidth[0, 1] = 1.0


def test_nics_and_prices(cluster: Cluster) -> None:
    assert cluster.nic_bandwidth(0) == 40 * GBPS
    assert np.isinf(cluster.nic_bandwidth(1))
    assert cluster.gpu_price(1) == 0.5
    assert cluster.price_per_hour == pytest.approx(2 * 3.69 + 3 * 0.5 + 0.526)


def test_own_hardware_without_a_price_is_free() -> None:
    local = parse_cluster({"nodes": [{"name": "x", "gpu": "cpu-1c", "count": 1}]}, "test")
    assert local.price_per_hour == 0


def test_a_type_of_the_file_goes_before_the_catalogs() -> None:
    mine = {
        "name": "T4",
        "vendor": "nvidia",
        "generation": "turing",
        "memory_gib": 16,
        "dense_tflops": 60,
        "memory_bandwidth_gb_s": 300,
        "link": {"kind": "pcie3", "gb_s": 8, "latency_us": 9},
        "sources": {"dense_tflops": "measured"},
    }
    cluster = parse_cluster({"nodes": [{"name": "x", "gpu": "T4", "count": 2}], "gpu_types": [mine]}, "test")
    assert cluster.gpus[0].type.flops == 60e12
    assert cluster.link(0, 1) == Link(bandwidth=8e9, latency=9e-6)


def test_a_stage_of_unlike_gpus_runs_at_its_slowest() -> None:
    fast, slow = gpu_type("H100-80G-SXM"), gpu_type("L40S")
    mixed = weakest([fast, slow, fast])
    assert mixed.name == "H100-80G-SXM+L40S"
    assert mixed.flops == slow.flops
    assert mixed.memory_bytes == slow.memory_bytes
    assert mixed.memory_bandwidth == slow.memory_bandwidth
    assert mixed.link == Link(bandwidth=slow.link.bandwidth, latency=slow.link.latency)
    assert weakest([fast, fast]) is fast


def test_a_link_takes_its_latency_and_its_size_over_its_bandwidth() -> None:
    assert Link(bandwidth=10e9, latency=1e-3).seconds(20e9) == pytest.approx(2.001)
