"""What NVML, the library of NVIDIA's driver, says about the GPUs of this machine. Nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SWITCH = "switch"
"""Stands for the far end of links that lead to an NVLink switch, and through it to every other GPU."""


@dataclass(frozen=True)
class NvmlGpu:
    """One GPU, in SI units. ``nvlinks``: how many links lead to which other GPU (by PCI address) or SWITCH,
    each of ``nvlink_bandwidth`` bytes/s each way. ``pcie_*``: the most that the GPU and its slot can do."""

    name: str
    pci: str
    memory_bytes: int
    used_bytes: int
    mig: bool
    capability: tuple[int, int]
    cores: int
    core_hz: float
    memory_hz: float
    bus_bits: int
    pcie_generation: int
    pcie_lanes: int
    nvlinks: Mapping[str, int]
    nvlink_bandwidth: float


def load_nvml() -> ModuleType | None:
    """NVML's Python binding; None where the machine has no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    pynvml.nvmlShutdown()
    binding: ModuleType = pynvml
    return binding


def read_gpus(nvml: Any) -> tuple[NvmlGpu, ...]:
    """Every GPU, in the order of PCI addresses (which engines are made to use too)."""
    with _session(nvml):
        return tuple(_read(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))


def driver_version(nvml: Any) -> str:
    """The driver's version."""
    with _session(nvml):
        return _text(nvml.nvmlSystemGetDriverVersion())


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _read(nvml: Any, index: int) -> NvmlGpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    links, bandwidth = _nvlinks(nvml, handle)
    return NvmlGpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        pci=_text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        memory_bytes=int(memory.total),
        used_bytes=int(memory.used),
        mig=bool(_optional(nvml, (0, 0), nvml.nvmlDeviceGetMigMode, handle)[0]),
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        cores=_optional(nvml, 0, nvml.nvmlDeviceGetNumGpuCores, handle),
        core_hz=1e6 * _optional(nvml, 0, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
        memory_hz=1e6 * _optional(nvml, 0, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM),
        bus_bits=_optional(nvml, 0, nvml.nvmlDeviceGetMemoryBusWidth, handle),
        pcie_generation=_optional(nvml, 0, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_lanes=_optional(nvml, 0, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        nvlinks=links,
        nvlink_bandwidth=bandwidth,
    )


def _nvlinks(nvml: Any, handle: Any) -> tuple[dict[str, int], float]:
    """The active NVLinks by where they lead, and the bandwidth of one of them in bytes/s each way."""
    ends: Counter[str] = Counter()
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if not _optional(nvml, 0, nvml.nvmlDeviceGetNvLinkState, handle, link):
            continue
        kind = _optional(nvml, None, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            ends[SWITCH] += 1
        elif kind == nvml.NVML_NVLINK_DEVICE_TYPE_GPU:
            ends[_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId)] += 1
    if not ends:
        return {}, 0.0
    (value,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    megabytes = value.value.uiVal if value.nvmlReturn == nvml.NVML_SUCCESS else 0
    return dict(ends), megabytes * 1e6


def _optional(nvml: Any, default: Any, call: Any, *arguments: Any) -> Any:
    """What NVML answers, or ``default`` where a GPU or driver does not know the question."""
    try:
        return call(*arguments)
    except nvml.NVMLError:
        return default


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
