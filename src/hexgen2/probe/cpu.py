"""A machine without a GPU as CPU devices: each a node with one engine of one thread."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hexgen2.probe.found import Found, FoundNode, FoundType
from hexgen2.probe.measure import CoreFigures
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GIB

FEWEST, MOST = 3, 8
"""Devices where nobody says how many: enough to split prefill from decode, no more than a test bed needs."""

ENGINE_BYTES = 1.2 * GIB
"""What an engine's processes take beside weights and KV cache (measured: vLLM's CPU build, set up small)."""

DEVICE_BYTES = (0.5 * GIB, 2.0 * GIB)
"""The least and the most that a device offers for weights and KV cache."""

SPARE = 0.2
"""The part of the free memory that is left alone."""

TYPE_NAME = "cpu-probed"


@dataclass(frozen=True)
class CpuMachine:
    """Cores and bytes that a process here may use (a container's limits count), the processor's name, and how
    many processes wanted to run (the load average of a minute)."""

    cores: float
    memory_bytes: float
    processor: str
    load: float


def read_machine(root: Path = Path("/")) -> CpuMachine:
    """What this machine, or container, has. ``root``: where /proc and /sys are."""
    cores = float(len(os.sched_getaffinity(0)))
    cgroup = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        cores = min(cores, float(quota) / float(period))  # ValueError for "max": no limit
    memory = _meminfo(root)["MemAvailable"]
    with suppress(OSError, ValueError):
        limit = float((cgroup / "memory.max").read_text())
        memory = min(memory, limit - float((cgroup / "memory.current").read_text()))
    return CpuMachine(max(cores, 0.1), memory, _processor(root), os.getloadavg()[0])


def found_cpu(
    machine: CpuMachine, core: CoreFigures, name: str, host: str, devices: int | None = None
) -> Found:
    """``devices`` CPU devices (as many as make sense by default), each a node of its own on this machine.

    InputError where the memory does not suffice for that many engines.
    """
    usable = machine.memory_bytes * (1 - SPARE)
    least = ENGINE_BYTES + DEVICE_BYTES[0]
    possible = int(usable // least)
    asked = devices
    if devices is None:
        devices = min(int(min(max(machine.cores, FEWEST), MOST)), possible)
    if devices < 1 or devices > possible:
        raise InputError(
            "--cpu-devices",
            "",
            f"{machine.memory_bytes / GIB:.1f} GiB of free memory hold {possible} engines of "
            f"{least / GIB:.1f} GiB, not {asked or 1}",
            "ask for fewer or free some memory",
        )
    memory = min(DEVICE_BYTES[1], usable / devices - ENGINE_BYTES)
    share = min(1.0, machine.cores / devices)
    bandwidth, latency = core.loopback_bandwidth, core.loopback_latency
    kind = FoundType(
        {
            "name": TYPE_NAME,
            "vendor": "cpu",
            "generation": platform.machine(),
            "memory_gib": _round(memory / GIB),
            "dense_tflops": _round(core.flops * share / 1e12),
            "dense_dtype": "fp32",
            "memory_bandwidth_gb_s": _round(core.memory_bandwidth * share / 1e9),
            "link": {
                "kind": "loopback",
                "gb_s": _round(bandwidth / 1e9),
                "latency_us": _round(latency * 1e6),
            },
        },
        (
            f"Measured on one thread: {core.flops / 1e9:.1f} GFLOP/s in an FP32 matrix product, "
            f"{core.memory_bandwidth / 1e9:.1f} GB/s reading memory.",
            f"{devices} devices share {machine.cores:g} cores, so each has {share:.0%} of a core.",
            f"memory_gib is what one engine may fill with weights and KV cache, of "
            f"{machine.memory_bytes / GIB:.1f} GiB that were free.",
        ),
    )
    nodes = tuple(
        FoundNode({"name": f"cpu-{_letters(place)}", "gpu": TYPE_NAME, "count": 1, "host": host})
        for place in range(devices)
    )
    return Found(
        name,
        nodes,
        (kind,),
        {"gbps": _round(bandwidth * 8 / 1e9), "latency_ms": _round(latency * 1e3)},
        (
            "Measured: TCP over 127.0.0.1, the best of three runs of 128 MiB; latency is half the median of "
            "500 round trips.",
        ),
        (f"{machine.processor}: no NVIDIA GPU was used.", *_busy(machine)),
    )


def _busy(machine: CpuMachine) -> tuple[str, ...]:
    if machine.load < machine.cores / 2:
        return ()
    return (
        f"The machine was busy (load {machine.load:.1f} on {machine.cores:g} cores): what was measured may be "
        "too low.",
    )


def _letters(place: int) -> str:
    """a, b, ... z, aa, ab: names that sort as they were counted, up to 702."""
    high, low = divmod(place, 26)
    return (chr(ord("a") + high - 1) if high else "") + chr(ord("a") + low)


def _meminfo(root: Path) -> Mapping[str, float]:
    """/proc/meminfo in bytes."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    return {name: float(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _processor(root: Path) -> str:
    with suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _round(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")
