"""This machine: its GPUs if it has some, else its CPU."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import Any, Literal

from hexgen2.probe.cpu import found_cpu, read_machine
from hexgen2.probe.found import Found
from hexgen2.probe.gpus import found_gpus
from hexgen2.probe.measure import measure_core
from hexgen2.probe.nvml import NvmlGpu, driver_version, load_nvml, read_gpus
from hexgen2.specs.errors import InputError

HOST = "127.0.0.1"

Devices = Literal["auto", "gpu", "cpu"]


def probe_machine(
    devices: Devices = "auto",
    cpu_devices: int | None = None,
    name: str | None = None,
    host: str = HOST,
    tell: Callable[[str], None] = lambda _: None,
    nvml: Any = None,
) -> Found:
    """Describe this machine. ``devices``: which to describe, by default the GPUs if there are some;
    ``cpu_devices``: how many CPU devices; ``host``: the address that others reach it by; ``tell`` hears of the
    progress; ``nvml`` stands in for NVML's binding. InputError where it cannot be done."""
    name = name or machine_name(socket.gethostname())
    if devices != "cpu":
        nvml = nvml or load_nvml()
        gpus = _gpus(nvml) if nvml else ()
        if gpus:
            tell(f"NVML reports {len(gpus)} GPU{'s' * (len(gpus) > 1)}")
            found = found_gpus(gpus, name, host)
            version = driver_version(nvml)
            remark = f"GPUs and their links as NVML reports them (driver {version}); nothing was timed."
            return Found(found.name, found.nodes, found.types, found.link, found.link_remarks, (remark,))
        if devices == "gpu":
            raise InputError(
                "--devices", "gpu", "NVML finds no NVIDIA GPU here", "install its driver, or use --devices cpu"
            )
    tell("measuring one core and the loopback interface")
    return found_cpu(read_machine(), measure_core(), name, host, cpu_devices)


def _gpus(nvml: Any) -> tuple[NvmlGpu, ...]:
    try:
        return read_gpus(nvml)
    except nvml.NVMLError as error:  # a GPU that is lost, a question that this machine may not ask
        problem = f"the driver does not describe the GPUs ({error})"
        raise InputError("NVML", "", problem, "look at `nvidia-smi`, or use --devices cpu") from None


def machine_name(hostname: str) -> str:
    """A node name made of a host name: its first part, without what node names may not have.

    >>> machine_name("gpu7.cluster.local")
    'gpu7'
    """
    return re.sub(r"[^A-Za-z0-9-]+", "-", hostname.partition(".")[0]).strip("-") or "machine"
