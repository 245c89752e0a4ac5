"""GPUs as NVML reports them become nodes, types and links."""

from __future__ import annotations

from typing import Any

import pytest

from hexgen2.deploy.hosts import device_numbers
from hexgen2.probe import Found, probe_machine
from hexgen2.probe.nvml import read_gpus
from hexgen2.specs import InputError, parse_cluster

from .fake_nvml import SWITCHED, Card, FakeNvml, NVMLError

H100 = Card("NVIDIA H100 80GB HBM3", 79.65, links=[SWITCHED] * 18, link_mbps=26_562, pcie=(5, 16))
A100_PCIE = Card("NVIDIA A100 80GB PCIe", 80.0)
L40S = Card("NVIDIA L40S", 45.0)


def probe(*cards: Card) -> Found:
    nvml = FakeNvml(*cards)
    found = probe_machine(name="box", nvml=nvml)
    assert nvml.open == 0, "NVML is closed again"
    return found


def nodes(found: Found) -> list[dict[str, Any]]:
    parse_cluster(found.document(), "test")
    return [dict(node.fields) for node in found.nodes]


def test_eight_alike_gpus_are_one_node() -> None:
    found = probe(*[H100] * 8)
    assert nodes(found) == [{"name": "box", "gpu": "H100-80G-SXM", "count": 8, "host": "127.0.0.1"}]
    assert found.link is None
    assert "478 GB/s" in " ".join(found.nodes[0].remarks)
    assert "570.86.15" in found.remarks[0]


def test_runs_of_types_are_nodes_in_the_order_of_the_devices() -> None:
    """The devices of an address are counted over its nodes, so the order must be the driver's."""
    found = probe(L40S, H100, H100, L40S)
    assert [(node["name"], node["gpu"], node["count"]) for node in nodes(found)] == [
        ("box-0", "L40S", 1),
        ("box-1", "H100-80G-SXM", 2),
        ("box-2", "L40S", 1),
    ]
    cluster = parse_cluster(found.document(), "test")
    numbers = device_numbers(cluster, {"box-1": "127.0.0.1", "box-2": "127.0.0.1"})
    assert numbers == {"box-1/0": 1, "box-1/1": 2, "box-2/0": 3}
    # Between nodes of one machine: the slower slot, PCIe 4 x16.
    assert cluster.node_link(0, 1).bandwidth == pytest.approx(32e9)


@pytest.mark.parametrize(
    ("cards", "expected_gb_s"),
    [
        ([A100_PCIE, A100_PCIE], None),  # PCIe 4 x16, as the type has it
        ([Card(A100_PCIE.name, 80.0, pcie=(4, 8))] * 2, 16),
        ([Card(A100_PCIE.name, 80.0, pcie=(3, 16)), A100_PCIE], 16),
        # Two bridged cards: 12 links of 25.8 GB/s.
        ([Card(A100_PCIE.name, 80.0, links=[1] * 12), Card(A100_PCIE.name, 80.0, links=[0] * 12)], 309.4),
        # Three cards of which two are bridged: the slowest pair counts.
        (
            [Card(A100_PCIE.name, 80.0, links=[1] * 12), Card(A100_PCIE.name, 80.0, links=[0] * 12), A100_PCIE],
            None,
        ),
        # SXM whose links are down: PCIe.
        ([Card(H100.name, 79.65, pcie=(5, 16))] * 2, 64),
        # A driver that does not tell the slot: cautious.
        ([Card(A100_PCIE.name, 80.0, pcie=None)] * 2, 0.25),
    ],
)
def test_links(cards: list[Card], expected_gb_s: float | None) -> None:
    found = probe(*cards)
    (node,) = nodes(found)
    if expected_gb_s is None:
        assert "intra_link" not in node
    else:
        assert node["intra_link"]["gbps"] == pytest.approx(expected_gb_s * 8, rel=1e-3)


def test_an_uneven_topology_is_remarked() -> None:
    bridged = [
        Card(A100_PCIE.name, 80.0, links=[1] * 12),
        Card(A100_PCIE.name, 80.0, links=[0] * 12),
        A100_PCIE,
    ]
    assert "the fastest has 309 GB/s" in " ".join(probe(*bridged).nodes[0].remarks)


def test_memory_in_use_is_remarked() -> None:
    remarks = " ".join(probe(Card(L40S.name, 45.0, used_gib=20)).nodes[0].remarks)
    assert "20.0 GiB of their memory were in use" in remarks


@pytest.mark.parametrize(
    ("card", "tflops", "bandwidth_gb_s"),
    # Real cards, with what their data sheets say: figures are derived at the highest clock, so a little high.
    [
        (Card("NVIDIA A100-X", 79.2, capability=(8, 0), cores=6912, clocks_mhz=(1440, 1593)), 312, 2039),
        (
            Card("NVIDIA RTX A5000", 24, capability=(8, 6), cores=8192, clocks_mhz=(1695, 8001), bus_bits=384),
            111,
            768,
        ),
        (
            Card(
                "NVIDIA GeForce RTX 4080",
                16,
                capability=(8, 9),
                cores=9728,
                clocks_mhz=(2505, 11_201),
                bus_bits=256,
            ),
            97.5,
            717,
        ),
        (
            Card("NVIDIA GH200", 96, capability=(9, 0), cores=16_896, clocks_mhz=(1830, 2619), bus_bits=6144),
            989,
            4023,
        ),
    ],
)
def test_an_unknown_gpu_gets_a_type_of_its_own(card: Card, tflops: float, bandwidth_gb_s: float) -> None:
    found = probe(card)
    (kind,) = parse_cluster(found.document(), "test").inline_types
    assert kind.flops / 1e12 == pytest.approx(tflops, rel=0.1)
    assert kind.memory_bandwidth / 1e9 == pytest.approx(bandwidth_gb_s, rel=0.02)
    assert kind.memory_bytes == pytest.approx(card.memory_gib * 2**30, rel=1e-3)
    assert "is not in the catalog" in found.types[0].remarks[0]


def test_the_architecture_table_gives_the_catalogs_figures() -> None:
    """Cards of the catalog under another name derive to what the catalog says of them."""
    from hexgen2.specs.catalog import gpu_type

    for known, card in {
        "A6000": Card("x", 48, capability=(8, 6), cores=10_752, clocks_mhz=(1800, 8001), bus_bits=384),
        "RTX4090": Card(
            "GeForce x", 24, capability=(8, 9), cores=16_384, clocks_mhz=(2520, 10_501), bus_bits=384
        ),
        "H100-80G-SXM": Card("x", 79.6, capability=(9, 0), cores=16_896, clocks_mhz=(1830, 2619)),
        "V100-32G-SXM": Card("x", 32, capability=(7, 0), cores=5120, clocks_mhz=(1530, 877), bus_bits=4096),
        "T4": Card("x", 15, capability=(7, 5), cores=2560, clocks_mhz=(1590, 5001), bus_bits=256),
        "RTX5090": Card(
            "GeForce x", 31.8, capability=(12, 0), cores=21_760, clocks_mhz=(2407, 14_001), bus_bits=512
        ),
    }.items():
        (derived,) = parse_cluster(probe(card).document(), "test").inline_types
        assert derived.flops == pytest.approx(gpu_type(known).flops, rel=0.03), known
        assert derived.memory_bandwidth == pytest.approx(gpu_type(known).memory_bandwidth, rel=0.03), known
        assert derived.dense_dtype == gpu_type(known).dense_dtype


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (Card(A100_PCIE.name, 80.0, mig=True), ("GPU 0", "MIG", "turn MIG off")),
        (Card("NVIDIA New", 80.0, capability=(13, 0)), ("GPU 0", "NVIDIA New", "gpu_types")),
        (Card("NVIDIA Old", 80.0, cores=None), ("not tell enough", "gpu_types")),
    ],
)
def test_what_cannot_be_described_is_told_in_one_line(card: Card, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        probe(card)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_gpu_that_is_lost_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> Any:
        raise NVMLError("GPU is lost")

    nvml = FakeNvml(H100)
    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", lost)
    with pytest.raises(InputError, match=r"NVML: the driver does not describe the GPUs \(GPU is lost\); look"):
        probe_machine(nvml=nvml)
    assert nvml.open == 0


def test_names_come_as_bytes_from_old_bindings() -> None:
    assert read_gpus(FakeNvml(H100))[0].name == "NVIDIA H100 80GB HBM3"


def test_the_fake_has_the_names_of_the_binding() -> None:
    """Each function and constant that the probe asks for is one of pynvml's."""
    import pynvml

    for name in (name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))):
        assert hasattr(pynvml, name), name
        if name.isupper() and name != "NVML_NVLINK_MAX_LINKS":
            if name.startswith("NVML_CLOCK"):
                continue
            assert getattr(FakeNvml, name) == getattr(pynvml, name)
