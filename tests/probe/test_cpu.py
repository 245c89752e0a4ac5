"""A machine without a GPU becomes CPU devices."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.probe import cluster_text, probe_machine
from hexgen2.probe.cpu import CpuMachine, found_cpu, read_machine
from hexgen2.probe.machine import machine_name
from hexgen2.probe.measure import CoreFigures, measure_core
from hexgen2.specs import GIB, InputError, load_cluster, parse_cluster
from hexgen2.specs.files import read_mapping

from .fake_nvml import Card, FakeNvml

CORE = CoreFigures(flops=90e9, memory_bandwidth=30e9, loopback_bandwidth=2.5e9, loopback_latency=10e-6)


def machine(cores: float = 2, memory_gib: float = 12, load: float = 0) -> CpuMachine:
    return CpuMachine(cores, memory_gib * GIB, "Some CPU", load)


@pytest.mark.parametrize(
    ("cores", "memory_gib", "asked", "devices", "tflops"),
    [
        (2, 12, None, 3, 0.06),  # three devices share two cores
        (4, 64, None, 4, 0.09),
        (64, 512, None, 8, 0.09),
        (2, 5, None, 2, 0.09),  # no memory for a third engine
        (2, 12, 2, 2, 0.09),
        (1, 12, 3, 3, 0.03),
        (0.5, 12, 1, 1, 0.045),  # a container with half a core
    ],
)
def test_devices_share_the_machine(
    cores: float, memory_gib: float, asked: int | None, devices: int, tflops: float
) -> None:
    found = found_cpu(machine(cores, memory_gib), CORE, "box", "127.0.0.1", asked)
    cluster = parse_cluster(found.document(), "test")
    assert [node.count for node in cluster.nodes] == [1] * devices
    assert {node.host for node in cluster.nodes} == {"127.0.0.1"}
    kind = cluster.gpus[0].type
    assert kind.vendor == "cpu"
    assert kind.flops / 1e12 == pytest.approx(tflops, rel=0.01)
    assert kind.memory_bandwidth / kind.flops == pytest.approx(30 / 90, rel=0.01)
    assert cluster.node_link(0, min(1, devices - 1)).bandwidth == pytest.approx(2.5e9, rel=0.01)


@given(
    cores=st.floats(0.5, 256),
    memory_gib=st.floats(2.2, 2048),
    devices=st.none() | st.integers(1, 30),
)
def test_engines_never_ask_for_more_memory_than_is_free(
    cores: float, memory_gib: float, devices: int | None
) -> None:
    try:
        found = found_cpu(machine(cores, memory_gib), CORE, "box", "127.0.0.1", devices)
    except InputError:
        assert devices is not None
        assert devices * 1.7 > memory_gib * 0.8 - 1e-6
        return
    cluster = parse_cluster(found.document(), "test")
    assert devices is None or len(cluster.nodes) == devices
    per_engine = cluster.gpus[0].type.memory_bytes + 1.2 * GIB
    assert len(cluster.nodes) * per_engine <= 0.805 * memory_gib * GIB


def test_too_little_memory_is_told() -> None:
    for asked, count in ((None, 1), (5, 5)):
        with pytest.raises(InputError, match=f"not {count}; ask for fewer or free some memory"):
            found_cpu(machine(memory_gib=1.5), CORE, "box", "127.0.0.1", asked)


def test_a_busy_machine_is_remarked() -> None:
    assert "busy (load 5.0 on 2 cores)" in " ".join(found_cpu(machine(load=5), CORE, "b", "127.0.0.1").remarks)
    assert "busy" not in " ".join(found_cpu(machine(load=0.3), CORE, "b", "127.0.0.1").remarks)


def write_system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 1 kB\nMemAvailable: 8388608 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores", "memory_gib"),
    [
        ({}, None, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, None, 8),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5, 8),
        (
            {"sys/fs/cgroup/memory.max": f"{4 * 2**30}\n", "sys/fs/cgroup/memory.current": f"{2**30}\n"},
            None,
            3,
        ),
    ],
)
def test_a_containers_limits_count(
    tmp_path: Path, files: dict[str, str], cores: float | None, memory_gib: float
) -> None:
    found = read_machine(write_system(tmp_path, files))
    assert found.cores == (len(os.sched_getaffinity(0)) if cores is None else cores)
    assert found.memory_bytes == memory_gib * GIB


def test_the_processors_name(tmp_path: Path) -> None:
    root = write_system(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name\t: AMD EPYC 9654\n"})
    assert read_machine(root).processor == "AMD EPYC 9654"


def test_a_core_is_measured() -> None:
    figures = measure_core()
    assert 1e9 < figures.flops < 1e12
    assert 0.5e9 < figures.memory_bandwidth < 1e12
    assert 1e7 < figures.loopback_bandwidth < 1e12
    assert 1e-7 < figures.loopback_latency < 0.1


def test_the_file_says_when_and_how_and_reads_back(tmp_path: Path) -> None:
    found = found_cpu(machine(), CORE, "box: 1", "127.0.0.1")
    when = datetime.datetime(2026, 11, 22, 9, 30, tzinfo=datetime.UTC)
    text = cluster_text(found, when, "9.9")
    assert text.startswith("# Probed on 2026-11-22 09:30 UTC by `hexgen2 probe` (HexGen-2 9.9).\n")
    assert "# Measured on one thread: 90.0 GFLOP/s" in text
    assert max(map(len, text.splitlines())) < 125
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert read_mapping(path, "cluster file") == found.document()
    assert load_cluster(path).name == "box: 1"


@pytest.mark.parametrize(
    ("hostname", "name"), [("gpu7.lan", "gpu7"), ("a_b", "a-b"), ("", "machine"), ("...", "machine")]
)
def test_machine_names(hostname: str, name: str) -> None:
    assert machine_name(hostname) == name


def test_gpus_go_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hexgen2.probe.machine.measure_core", lambda: CORE)
    nvml = FakeNvml(Card("NVIDIA L4", 22.5))
    assert probe_machine(nvml=nvml).nodes[0].fields["gpu"] == "L4"
    assert probe_machine("cpu", 1, nvml=nvml).nodes[0].fields["gpu"] == "cpu-probed"
    assert probe_machine(cpu_devices=1, nvml=FakeNvml()).nodes[0].fields["gpu"] == "cpu-probed"
    with pytest.raises(InputError, match="NVML finds no NVIDIA GPU"):
        probe_machine("gpu", nvml=FakeNvml())


def test_a_machine_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    from hexgen2.probe.nvml import load_nvml

    def missing() -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert load_nvml() is None
