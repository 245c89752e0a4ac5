"""Write the example clusters of 64, 320 and 1,024 GPUs.

    python tools/large_clusters.py

Racks of unlike nodes, shuffled with a fixed seed: fast links inside a rack, slow ones (the network's default)
between racks, and a NIC per node that all its links share. The same script always writes the same files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

CLUSTERS = Path(__file__).parent.parent / "examples" / "clusters"
SEED = 2502  # the paper is arXiv 2502.07903
RACK_GBPS = (50, 100, 200)
NIC_GBPS = {
    "H200-141G-SXM": 400,
    "H100-80G-SXM": 400,
    "A100-80G-SXM": 200,
    "A100-80G-PCIe": 100,
    "L40S": 100,
    "L40": 50,
    "A6000": 25,
}


@dataclass(frozen=True)
class Nodes:
    """``nodes`` nodes with ``count`` GPUs of one type each."""

    gpu: str
    count: int
    nodes: int


@dataclass(frozen=True)
class Recipe:
    """What a cluster is made of; ``rack`` nodes share a rack, ``between_gbps`` joins racks."""

    parts: tuple[Nodes, ...]
    rack: int
    between_gbps: int

    @property
    def gpus(self) -> int:
        return sum(part.count * part.nodes for part in self.parts)


RECIPES = (
    Recipe(
        (Nodes("H100-80G-SXM", 4, 3), Nodes("A100-80G-PCIe", 4, 4), Nodes("L40", 4, 5), Nodes("A6000", 4, 4)),
        rack=4,
        between_gbps=10,
    ),
    Recipe(
        (
            Nodes("H100-80G-SXM", 8, 6),
            Nodes("A100-80G-SXM", 8, 8),
            Nodes("L40S", 4, 16),
            Nodes("L40", 4, 16),
            Nodes("A6000", 4, 20),
        ),
        rack=6,
        between_gbps=10,
    ),
    Recipe(
        (
            Nodes("H200-141G-SXM", 8, 8),
            Nodes("H100-80G-SXM", 8, 24),
            Nodes("A100-80G-SXM", 8, 32),
            Nodes("L40S", 8, 32),
            Nodes("L40", 4, 32),
            Nodes("A6000", 4, 32),
        ),
        rack=8,
        between_gbps=25,
    ),
)


def cluster_text(recipe: Recipe) -> str:
    """The cluster file of a recipe."""
    return "\n".join(_lines(recipe)) + "\n"


def cluster_path(recipe: Recipe) -> Path:
    return CLUSTERS / f"large-{recipe.gpus}.yaml"


def _lines(recipe: Recipe) -> Iterator[str]:
    rng = random.Random(SEED)
    nodes = [(part.gpu, part.count) for part in recipe.parts for _ in range(part.nodes)]
    rng.shuffle(nodes)
    names = [f"r{place // recipe.rack}n{place % recipe.rack}" for place in range(len(nodes))]
    kinds = len(recipe.parts)
    yield f"# {recipe.gpus:,} GPUs of {kinds} types on {len(nodes)} nodes; r1n0 is node 0 of rack 1."
    yield "# Written by tools/large_clusters.py; do not edit."
    yield f"name: large-{recipe.gpus}"
    yield "nodes:"
    for name, (gpu, count) in zip(names, nodes, strict=True):
        yield f"  - {{name: {name}, gpu: {gpu}, count: {count}, nic_gbps: {NIC_GBPS[gpu]}}}"
    yield "network:"
    yield f"  default: {{gbps: {recipe.between_gbps}, latency_ms: 0.5}}"
    yield "  links:"
    for start in range(0, len(names), recipe.rack):
        gbps = rng.choice(RACK_GBPS)
        for a, b in combinations(names[start : start + recipe.rack], 2):
            yield f"    - {{between: [{a}, {b}], gbps: {gbps}, latency_ms: 0.05}}"


def main() -> None:
    for recipe in RECIPES:
        cluster_path(recipe).write_text(cluster_text(recipe), encoding="utf-8")
        print(f"wrote {cluster_path(recipe).relative_to(CLUSTERS.parent.parent)}")


if __name__ == "__main__":
    main()
