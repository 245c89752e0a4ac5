"""From GPUs to the nodes and types of a cluster file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

from hexgen2.probe.found import Found, FoundNode, FoundType
from hexgen2.probe.nvml import SWITCH, NvmlGpu
from hexgen2.specs.catalog import gpu_type, type_of_product
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GIB

PCIE_LANE_BANDWIDTH = {1: 0.25e9, 2: 0.5e9, 3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}
"""Bytes/s of one lane each way, by PCI Express generation."""

LATENCY_S = {"nvlink": 3e-6, "pcie": 5e-6}
"""Of a small message between two GPUs: the catalog's assumption for such links; NVML does not know it."""

LINK_TOLERANCE = 0.1
"""A link within this of the type's is not written: driver and data sheet round differently."""


@dataclass(frozen=True)
class Architecture:
    """What a compute capability means: CUDA cores of a multiprocessor (SM), and dense 16-bit tensor operations
    that it does in a clock with FP32 accumulation (GeForce: half of that)."""

    generation: str
    cores_per_sm: int
    flops_per_sm_clock: int
    dtype: str = "bf16"


ARCHITECTURES = {
    (7, 0): Architecture("volta", 64, 1024, "fp16"),
    (7, 5): Architecture("turing", 64, 1024, "fp16"),
    (8, 0): Architecture("ampere", 64, 2048),
    (8, 6): Architecture("ampere", 128, 1024),
    (8, 9): Architecture("ada", 128, 1024),
    (9, 0): Architecture("hopper", 128, 4096),
    (10, 0): Architecture("blackwell", 128, 8192),
    (12, 0): Architecture("blackwell", 128, 1024),
}


def found_gpus(gpus: Sequence[NvmlGpu], name: str, host: str) -> Found:
    """Nodes for the GPUs of a machine: one for each run of GPUs of one type, in the order of their numbers,
    since the devices of an address are counted over its nodes. InputError for what cannot be planned for."""
    types: dict[str, FoundType] = {}
    kinds: list[str] = []
    for index, gpu in enumerate(gpus):
        if gpu.mig:
            raise InputError(
                f"GPU {index}", gpu.name, "is split by MIG, and plans are for whole GPUs", "turn MIG off there"
            )
        kind = type_of_product(gpu.name, gpu.memory_bytes)
        if kind is None:
            derived = derived_type(gpu, index)
            kind = str(derived.fields["name"])
            types[kind] = derived
        kinds.append(kind)
    runs = [
        (kind, [index for index, _ in run]) for kind, run in groupby(enumerate(kinds), key=lambda pair: pair[1])
    ]
    nodes = tuple(
        _node(name if len(runs) == 1 else f"{name}-{place}", kind, indices, gpus, types, host)
        for place, (kind, indices) in enumerate(runs)
    )
    if len(nodes) == 1:
        return Found(name, nodes, tuple(types.values()))
    slowest = min(_pcie_bandwidth(gpu) for gpu in gpus)
    return Found(
        name,
        nodes,
        tuple(types.values()),
        _figures(slowest, LATENCY_S["pcie"]),
        ("Nodes of one machine: their GPUs meet over PCI Express. As the driver reports it; latency assumed.",),
    )


def derived_type(gpu: NvmlGpu, index: int) -> FoundType:
    """A type for a GPU that the catalog does not know, from what the driver reports of its chip."""
    known = ARCHITECTURES.get(gpu.capability)
    if known is None or not (gpu.cores and gpu.core_hz and gpu.memory_hz and gpu.bus_bits):
        raise InputError(
            f"GPU {index}",
            gpu.name,
            "is not in the catalog, and the driver does not tell enough about it",
            "describe it by hand under gpu_types in a cluster file (see docs/catalog.md)",
        )
    flops = gpu.cores / known.cores_per_sm * known.flops_per_sm_clock * gpu.core_hz
    if "GeForce" in gpu.name:
        flops /= 2
    bandwidth = gpu.bus_bits / 8 * 2 * gpu.memory_hz
    memory_gib = _round(gpu.memory_bytes / GIB)
    return FoundType(
        {
            "name": "-".join(gpu.name.removeprefix("NVIDIA ").split()) + f"-{memory_gib:.0f}G",
            "vendor": "nvidia",
            "generation": known.generation,
            "memory_gib": memory_gib,
            "dense_tflops": _round(flops / 1e12),
            "dense_dtype": known.dtype,
            "memory_bandwidth_gb_s": _round(bandwidth / 1e9),
            "link": {
                "kind": f"pcie{gpu.pcie_generation}",
                "gb_s": _round(_pcie_bandwidth(gpu) / 1e9),
                "latency_us": LATENCY_S["pcie"] * 1e6,
            },
        },
        (
            f"{gpu.name!r} is not in the catalog. Memory as the driver reports it; TFLOP/s derived from "
            f"{gpu.cores} cores at their highest clock ({gpu.core_hz / 1e6:.0f} MHz), which is rather high; "
            f"bandwidth from {gpu.bus_bits} bits at {gpu.memory_hz / 1e6:.0f} MHz. A data sheet is better.",
        ),
    )


def pair_link(a: NvmlGpu, b: NvmlGpu) -> tuple[str, float]:
    """What joins two GPUs of a machine, `nvlink` or `pcie`, and its bytes/s each way."""
    direct = min(a.nvlinks.get(b.pci, 0), b.nvlinks.get(a.pci, 0))
    switched = min(a.nvlinks.get(SWITCH, 0), b.nvlinks.get(SWITCH, 0))
    links = direct + switched
    speed = min(a.nvlink_bandwidth, b.nvlink_bandwidth)
    if links and speed:
        return "nvlink", links * speed
    return "pcie", min(_pcie_bandwidth(a), _pcie_bandwidth(b))


def _node(
    name: str,
    kind: str,
    indices: Sequence[int],
    gpus: Sequence[NvmlGpu],
    types: dict[str, FoundType],
    host: str,
) -> FoundNode:
    fields: dict[str, object] = {"name": name, "gpu": kind, "count": len(indices), "host": host}
    members = [gpus[index] for index in indices]
    numbers = f"{indices[0]}" if len(indices) == 1 else f"{indices[0]} to {indices[-1]}"
    remarks = [f"GPU {numbers}: {members[0].name}, {members[0].memory_bytes / GIB:.1f} GiB."]
    used = sum(gpu.used_bytes for gpu in members) / GIB
    if used > 1:
        remarks.append(f"{used:.1f} GiB of their memory were in use: free it before serving.")
    if len(members) > 1:
        links = [pair_link(a, b) for a, b in combinations(members, 2)]
        by, bandwidth = min(links, key=lambda link: link[1])
        remarks.append(f"Joined by {by}, {bandwidth / 1e9:.0f} GB/s each way, as the driver reports it.")
        if len({round(link[1]) for link in links}) > 1:
            best = max(link[1] for link in links) / 1e9
            remarks.append(f"The slowest pair is written; the fastest has {best:.0f} GB/s.")
        if kind in types or abs(bandwidth / gpu_type(kind).link.bandwidth - 1) > LINK_TOLERANCE:
            fields["intra_link"] = _figures(bandwidth, LATENCY_S[by])
    return FoundNode(fields, tuple(remarks))


def _pcie_bandwidth(gpu: NvmlGpu) -> float:
    """Bytes/s each way; of the oldest generation and one lane where the driver does not say."""
    return PCIE_LANE_BANDWIDTH.get(gpu.pcie_generation, PCIE_LANE_BANDWIDTH[1]) * max(gpu.pcie_lanes, 1)


def _figures(bandwidth: float, latency_s: float) -> dict[str, float]:
    return {"gbps": _round(bandwidth * 8 / 1e9), "latency_ms": _round(latency_s * 1e3)}


def _round(value: float, digits: int = 4) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits}g}")
