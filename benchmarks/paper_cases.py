"""What paper.py evaluates: clusters, loads, systems, assumptions, and the cases made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

HOMOGENEOUS = "homogeneous-8xh100"
MIXED = ("mixed-1", "mixed-2", "mixed-3", "mixed-4")
"""The paper's heterogeneous settings 1 to 4: about the price of the 8 H100."""
CHEAPER = "mixed-5"
"""The paper's setting 5: 70% of that price."""
MODELS = ("llama-2-70b", "opt-30b")
CLASSES = ("hpld", "hphd", "lphd", "lpld")
TRACE = "azure-conv"
LOADS = (*CLASSES, TRACE)
OURS = ("ours", "ours-vllm")
TARGET_SCALES = (0.25, 0.5, 1.0)
BASE_TARGETS = (2.0, 0.2)
"""Seconds to the first token and per token after it, at scale 1: MLPerf Inference's for Llama 2 70B."""
LINK_SCALES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
SEARCH_S = 1.0
"""Seconds of processor time of every search that is compared with another (ablations)."""


@dataclass(frozen=True)
class System:
    """Who plans: a solver, the engine profile it plans for, and what its name is in tables."""

    solver: str
    engine: str
    says: str
    init: str = "spectral"
    colocated: bool = True
    kv_edges: bool = True


SYSTEMS = {
    "ours": System("hexgen2", "any", "ours (any layout)"),
    "ours-vllm": System("hexgen2", "vllm", "ours (vLLM's rules)"),
    "paper": System("paper", "any", "the paper's algorithm"),
    "hexgen": System("hexgen", "any", "HexGen-like"),
    "colocated": System("colocated", "vllm", "vLLM, colocated"),
    "distserve": System("distserve", "any", "DistServe-like"),
    "distserve-pairs": System("distserve-pairs", "any", "DistServe-like, in pairs"),
    # What the ablations change.
    "random-swap": System("random-swap", "any", "random swaps"),
    "genetic": System("genetic", "any", "genetic"),
    "metis": System("paper", "any", "METIS start", init="metis"),
    "no-kv-edges": System("paper", "any", "no KV-aware edges", kv_edges=False),
    "disaggregated": System("hexgen2", "any", "ours without colocated groups", colocated=False),
}
ABLATED = ("paper", "random-swap", "genetic", "metis", "no-kv-edges", "ours", "disaggregated")


@dataclass(frozen=True)
class World:
    """Assumptions under which all systems are compared.

    ``h100``: the GPU type of nodes that hold H100s (their price stays). ``host_bound``: engines with the host
    overheads fitted on a measured engine of 2023 (profile splitwise-2023). ``chunked``: colocated groups
    run prompts beside decoding sequences. ``baseline``: the system that stands for DistServe.
    """

    says: str
    h100: str = "H100-80G-SXM"
    host_bound: bool = False
    chunked: bool = True
    baseline: str = "distserve"


WORLDS = {
    "base": World("as modelled: H100 SXM, a current engine, chunked prefill"),
    "pairs": World("DistServe in equal pairs, as its launcher starts it", baseline="distserve-pairs"),
    "no-chunks": World("colocated engines without chunked prefill", chunked=False),
    "host-bound": World("host overheads of an engine of 2023", host_bound=True),
    "pcie": World("the H100 are PCIe cards", h100="H100-80G-PCIe"),
    "pcie-2024": World(
        "PCIe cards, no chunked prefill, DistServe in pairs",
        h100="H100-80G-PCIe",
        chunked=False,
        baseline="distserve-pairs",
    ),
    "all": World(
        "all four",
        h100="H100-80G-PCIe",
        host_bound=True,
        chunked=False,
        baseline="distserve-pairs",
    ),
}


@dataclass(frozen=True)
class Case:
    """One plan to make and measure; equal cases have equal results.

    ``targets``: seconds (TTFT, TPOT) that goodput counts by, None for throughput. ``links``: factor on every
    link and NIC between nodes. ``limit_s``: processor seconds of the search, None: as long as it takes.
    """

    system: str
    cluster: str
    model: str
    load: str
    world: str = "base"
    targets: tuple[float, float] | None = None
    links: float = 1.0
    limit_s: float | None = None

    @property
    def key(self) -> str:
        """Names the case in the file of results."""
        parts = [self.world, self.cluster, self.model, self.load, self.system]
        if self.targets:
            parts.append(f"ttft{self.targets[0]:g}-tpot{self.targets[1]:g}")
        if self.links != 1.0:
            parts.append(f"links{self.links:g}")
        if self.limit_s is not None:
            parts.append(f"limit{self.limit_s:g}")
        return "/".join(parts)


def targets_at(scale: float) -> tuple[float, float]:
    """The latency targets at a scale of `BASE_TARGETS`."""
    return BASE_TARGETS[0] * scale, BASE_TARGETS[1] * scale


def main_cases(loads: tuple[str, ...] = LOADS) -> Iterator[Case]:
    """Saturation throughput of every system (the paper's offline figures), setting 5 with the others."""
    for model, load in product(MODELS, loads):
        for system in ("distserve", "colocated", *OURS):
            yield Case(system, HOMOGENEOUS, model, load)
        for cluster in (*MIXED, CHEAPER):
            for system in (*OURS, "paper", "hexgen", "colocated"):
                yield Case(system, cluster, model, load)


def world_cases(world: str) -> Iterator[Case]:
    """The same comparison under other assumptions, without what does not depend on them."""
    baseline = WORLDS[world].baseline
    for model, load in product(MODELS, LOADS if world == "all" else CLASSES):
        yield Case(baseline, HOMOGENEOUS, model, load, world)
        yield Case("ours", HOMOGENEOUS, model, load, world)
        for cluster in (*MIXED, CHEAPER):
            for system in ("ours", "hexgen"):
                yield Case(system, cluster, model, load, world)


def stored_world(case: Case) -> Case:
    """The case whose result holds for this one: worlds that differ in the baseline alone share theirs."""
    world = WORLDS[case.world]
    same = replace(world, says="", baseline="")
    for name, other in WORLDS.items():
        if replace(other, says="", baseline="") == same:
            return replace(case, world=name)
    return case


def target_cases(scales: tuple[float, ...] = TARGET_SCALES) -> Iterator[Case]:
    """Goodput: both sides plan for the same latency targets and are measured by them."""
    for scale, model, load in product(scales, MODELS, CLASSES):
        targets = targets_at(scale)
        for system in ("distserve", "ours"):
            yield Case(system, HOMOGENEOUS, model, load, targets=targets)
        for cluster in MIXED:
            yield Case("ours", cluster, model, load, targets=targets)
            if scale == 0.5:
                yield Case("hexgen", cluster, model, load, targets=targets)
    for model, system in product(MODELS, ("distserve", "ours", "hexgen")):
        for cluster in (HOMOGENEOUS,) if system == "distserve" else MIXED:
            yield Case(system, cluster, model, TRACE, targets=BASE_TARGETS)


def ablation_cases() -> Iterator[Case]:
    """The paper's ablation (section 5.3): every search for the same time."""
    for cluster, model, load, system in product(MIXED, MODELS, CLASSES, ABLATED):
        yield Case(system, cluster, model, load, limit_s=SEARCH_S)


def link_cases() -> Iterator[Case]:
    """All links between nodes faster or slower, on setting 1."""
    for scale, model, load in product(LINK_SCALES, MODELS, ("hphd", "lphd")):
        for system in ("ours", "paper", "hexgen"):
            yield Case(system, MIXED[0], model, load, links=scale)
