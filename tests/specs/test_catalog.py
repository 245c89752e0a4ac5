"""The catalog holds what the contract names, each figure with a source and a date."""

from __future__ import annotations

import datetime

import pytest

from hexgen2.specs import GIB
from hexgen2.specs.catalog import gpu_price, gpu_prices, gpu_sources, gpu_type, gpu_type_names
from hexgen2.specs.catalog.workloads import workload_table

GPUS = {
    # decimal GB of the data sheet, dense 16-bit TFLOP/s, GB/s
    "H100-80G-SXM": (80, 989, 3350),
    "H100-80G-PCIe": (80, 756, 2000),
    "H100-94G-NVL": (94, 835, 3900),
    "H200-141G-SXM": (141, 989, 4800),
    "B200-180G-SXM": (180, 2250, 8000),
    "A100-40G-SXM": (40, 312, 1555),
    "A100-80G-SXM": (80, 312, 2039),
    "A100-40G-PCIe": (40, 312, 1555),
    "A100-80G-PCIe": (80, 312, 1935),
    "L40": (48, 181, 864),
    "L40S": (48, 362, 864),
    "L4": (24, 121, 300),
    "A6000": (48, 155, 768),
    "A40": (48, 150, 696),
    "A10G": (24, 70, 600),
    "V100-32G-SXM": (32, 125, 900),
    "T4": (16, 65, 320),
    "RTX3090": (24, 71, 936),
    "RTX4090": (24, 165, 1008),
    "RTX5090": (32, 209, 1792),
    "MI300X": (192, 1307, 5300),
}
FIGURES = {"memory_gib", "dense_tflops", "memory_bandwidth_gb_s", "link"}
WITHOUT_BF16 = {"V100-32G-SXM", "T4"}
CPUS = {"cpu-1c", "cpu-1c-4g", "cpu-2c-4g"}


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_those_of_the_data_sheet(name: str) -> None:
    """To 5%, so that a sparse figure (twice the dense one) or a slip of units shows.

    Usable memory may lack more: ECC takes up to a sixteenth, the driver some on top.
    """
    gigabytes, tflops, bandwidth = GPUS[name]
    kind = gpu_type(name)
    assert kind.flops / 1e12 == pytest.approx(tflops, rel=0.05)
    assert kind.memory_bandwidth / 1e9 == pytest.approx(bandwidth, rel=0.05)
    assert 0.9 * gigabytes * 1e9 <= kind.memory_bytes <= gigabytes * GIB
    assert kind.dense_dtype == ("fp16" if name in WITHOUT_BF16 else "bf16")
    assert kind.vendor == ("amd" if name == "MI300X" else "nvidia")


def test_no_type_is_missing_and_none_is_extra() -> None:
    assert set(gpu_type_names()) == set(GPUS) | CPUS


@pytest.mark.parametrize("name", gpu_type_names())
def test_every_figure_has_a_source_and_a_date(name: str) -> None:
    sources = gpu_sources(name)
    assert set(sources) == FIGURES
    for document in sources.values():
        assert document.title
        assert document.url
        assert document.read >= datetime.date(2024, 1, 1)


@pytest.mark.parametrize(
    ("name", "kind", "gigabytes_per_s"),
    [
        ("H100-80G-SXM", "nvlink4", 450),
        ("H200-141G-SXM", "nvlink4", 450),
        ("B200-180G-SXM", "nvlink5", 900),
        ("A100-80G-SXM", "nvlink3", 300),
        ("V100-32G-SXM", "nvlink2", 150),
        ("H100-94G-NVL", "nvlink4-bridge", 300),
        ("H100-80G-PCIe", "pcie5", 64),
        ("A100-80G-PCIe", "pcie4", 32),
        ("A6000", "pcie4", 32),
        ("T4", "pcie3", 16),
    ],
)
def test_links_count_one_direction(name: str, kind: str, gigabytes_per_s: float) -> None:
    gpu = gpu_type(name)
    assert gpu.link_kind == kind
    assert gpu.link.bandwidth == gigabytes_per_s * 1e9
    assert 1e-6 <= gpu.link.latency <= 20e-6


def test_every_gpu_has_a_dated_price_and_no_cpu_has_one() -> None:
    assert set(gpu_prices()) == set(GPUS)
    for name, entry in gpu_prices().items():
        assert 0.1 < entry.usd_per_hour < 10, name
        assert entry.source
        assert entry.date >= datetime.date(2024, 1, 1)
    assert 8 * (gpu_price("H100-80G-SXM") or 0) == pytest.approx(29.52)
    assert [gpu_price(name) for name in sorted(CPUS)] == [None, None, None]


def test_an_unlike_pair_of_cpus_describes_a_mixed_test_bed() -> None:
    small, large = gpu_type("cpu-1c"), gpu_type("cpu-1c-4g")
    assert small.vendor == large.vendor == "cpu"
    assert small.memory_bytes == 2 * GIB < large.memory_bytes
    assert small.flops > large.flops
    assert small.memory_bandwidth > large.memory_bandwidth


def test_every_workload_has_its_trace_with_a_date() -> None:
    table = workload_table()
    assert table.levels[0] == 0
    assert table.levels[-1] == 1
    assert list(table.levels) == sorted(set(table.levels))
    for entry in table.workloads.values():
        assert len(entry.inputs) == len(entry.outputs) == len(table.levels)
        assert list(entry.inputs) == sorted(entry.inputs)
        assert list(entry.outputs) == sorted(entry.outputs)
        assert table.traces[entry.trace].licence == "CC-BY-4.0"
