"""Where a group's GPUs stand, as the bound sees it: single nodes, or all nodes of one kind together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hexgen2.scheduler.columns import Kinds
from hexgen2.scheduler.topology import Topology
from hexgen2.specs.gpu import GpuType, Link


@dataclass(frozen=True)
class Places:
    """Sets of alike nodes, K of them; a group is a count of GPUs per place.

    Where a place has several nodes, or links differ, the best figures stand for all: no real group of the same
    counts has better ones.
    """

    topology: Topology
    nodes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of_nodes(topology: Topology) -> Places:
        """Every node by itself."""
        return Places(topology, tuple((node,) for node in range(len(topology.counts))))

    @staticmethod
    def of_kinds(kinds: Kinds) -> Places:
        """All nodes of a kind together."""
        return Places(kinds.topology, kinds.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def width(self) -> tuple[int, ...]:
        """GPUs of one node of each place."""
        return tuple(self.topology.counts[nodes[0]] for nodes in self.nodes)

    @cached_property
    def room(self) -> tuple[int, ...]:
        """GPUs of all nodes of each place."""
        return tuple(sum(self.topology.counts[node] for node in nodes) for nodes in self.nodes)

    @cached_property
    def types(self) -> tuple[GpuType, ...]:
        """GPU type of each place."""
        return tuple(self.topology.types[nodes[0]] for nodes in self.nodes)

    @cached_property
    def inside(self) -> tuple[Link, ...]:
        """The best link between two GPUs of one node of each place."""
        return tuple(_best([self.topology.intra[node] for node in nodes]) for nodes in self.nodes)

    @cached_property
    def between(self) -> tuple[tuple[Link | None, ...], ...]:
        """[a][b]: the best link from a node of place b to another node of place a; None where there is none."""
        return tuple(tuple(self._between(a, b) for b in range(len(self))) for a in range(len(self)))

    def halves(self, slot: tuple[int, int]) -> int:
        """2 for a stage (place, GPUs) that takes more than half of a node, 1 for half a node, else 0."""
        place, tp = slot
        return int(2 * tp >= self.width[place]) + int(2 * tp > self.width[place])

    def beside(self, slot: tuple[int, int]) -> int:
        """The GPUs of a stage (place, GPUs) that leaves room on its node; 0 for one that fills it."""
        place, tp = slot
        return tp if tp < self.width[place] else 0

    def _between(self, a: int, b: int) -> Link | None:
        pairs = np.ix_(self.nodes[a], self.nodes[b])
        bandwidth, latency = self.topology.bandwidth[pairs], self.topology.latency[pairs]
        if a == b:
            other = ~np.eye(len(self.nodes[a]), dtype=bool)
            bandwidth, latency = bandwidth[other], latency[other]
        if not bandwidth.size:
            return None
        return Link(bandwidth=float(bandwidth.max()), latency=float(latency.min()))


def _best(links: Sequence[Link]) -> Link:
    return Link(bandwidth=max(link.bandwidth for link in links), latency=min(link.latency for link in links))
