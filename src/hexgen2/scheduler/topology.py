"""The cluster as the search sees it: nodes, their GPU counts, and classes of equal nodes and links.

GPUs of one node are interchangeable (one type, one link between any two), so the search says how many GPUs of
which node a group has: its *members*, a sorted tuple of (node, count). Real GPUs are dealt out at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from hexgen2.specs.cluster import Cluster
from hexgen2.specs.gpu import GpuType, Link

Members = tuple[tuple[int, int], ...]
"""(node, GPUs of it), sorted by node; no entry with zero GPUs."""


def members_of(counts: dict[int, int]) -> Members:
    """Members from a mapping node → GPUs, leaving out zeros."""
    return tuple(sorted((node, count) for node, count in counts.items() if count > 0))


def combined(first: Members, second: Members) -> Members:
    """The GPUs of both."""
    counts = dict(first)
    for node, count in second:
        counts[node] = counts.get(node, 0) + count
    return members_of(counts)


def without(whole: Members, part: Members) -> Members:
    """The GPUs of ``whole`` that are not in ``part``."""
    counts = dict(whole)
    for node, count in part:
        counts[node] -= count
        assert counts[node] >= 0, "took away GPUs that were not there"
    return members_of(counts)


def size(members: Members) -> int:
    """How many GPUs there are."""
    return sum(count for _, count in members)


@dataclass(frozen=True)
class Topology:
    """Node figures of a cluster as arrays; N nodes."""

    cluster: Cluster

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """GPUs of each node."""
        return tuple(node.count for node in self.cluster.nodes)

    @cached_property
    def everything(self) -> Members:
        return members_of(dict(enumerate(self.counts)))

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """(N,) index of each node's first GPU."""
        starts: NDArray[np.int64] = np.cumsum([0, *self.counts[:-1]]).astype(np.int64)
        return starts

    @cached_property
    def types(self) -> tuple[GpuType, ...]:
        """GPU type of each node."""
        return tuple(self.cluster.gpus[start].type for start in self.first)

    @cached_property
    def memory(self) -> NDArray[np.float64]:
        """(N,) bytes of one GPU of each node."""
        return np.array([kind.memory_bytes for kind in self.types])

    @cached_property
    def intra(self) -> tuple[Link, ...]:
        """The link between two GPUs of each node."""
        return tuple(self.cluster.intra_link(node) for node in range(len(self.counts)))

    @cached_property
    def bandwidth(self) -> NDArray[np.float64]:
        """(N, N) bytes/s between GPUs of two nodes; inside a node on the diagonal."""
        matrix = self.cluster.bandwidth[np.ix_(self.first, self.first)].copy()
        np.fill_diagonal(matrix, [link.bandwidth for link in self.intra])
        return matrix

    @cached_property
    def latency(self) -> NDArray[np.float64]:
        """(N, N) seconds between GPUs of two nodes; inside a node on the diagonal."""
        matrix = self.cluster.latency[np.ix_(self.first, self.first)].copy()
        np.fill_diagonal(matrix, [link.latency for link in self.intra])
        return matrix

    @cached_property
    def node_class(self) -> NDArray[np.int64]:
        """(N,) nodes of one class have the same GPU type and the same link inside."""
        pairs = zip(self.types, self.intra, strict=True)
        keys = [(kind.name, link.bandwidth, link.latency) for kind, link in pairs]
        place = {key: index for index, key in enumerate(sorted(set(keys)))}
        return np.array([place[key] for key in keys])

    @cached_property
    def link_class(self) -> NDArray[np.int64]:
        """(N, N) equal numbers mean equal bandwidth and latency between the nodes."""
        pairs = np.stack([self.bandwidth.ravel(), self.latency.ravel()], axis=1)
        _, inverse = np.unique(pairs, axis=0, return_inverse=True)
        classes: NDArray[np.int64] = inverse.reshape(self.bandwidth.shape)
        return classes

    @cached_property
    def _links(self) -> dict[int, Link]:
        values, where = np.unique(self.link_class.ravel(), return_index=True)
        bandwidth, latency = self.bandwidth.ravel(), self.latency.ravel()
        return {
            int(value): Link(bandwidth=float(bandwidth[at]), latency=float(latency[at]))
            for value, at in zip(values, where, strict=True)
        }

    def link(self, a: int, b: int) -> Link:
        """The link between GPUs of two nodes (or of one, when they are the same)."""
        return self.link_of_class(int(self.link_class[a, b]))

    def link_of_class(self, number: int) -> Link:
        """The link that a number of `link_class` stands for."""
        return self._links[number]

    def slowest(self, pairs: list[tuple[int, int]]) -> Link | None:
        """The lowest bandwidth and the highest latency over pairs of nodes; None without pairs."""
        links = {int(self.link_class[a, b]): self.link(a, b) for a, b in pairs}
        if not links:
            return None
        if len(links) == 1:
            return next(iter(links.values()))
        return Link(
            bandwidth=min(link.bandwidth for link in links.values()),
            latency=max(link.latency for link in links.values()),
        )

    @cached_property
    def community(self) -> NDArray[np.int64]:
        """(N,) nodes that are joined by better links than the slowest ones share a number (racks, zones)."""
        count = len(self.counts)
        if count == 1:
            return np.zeros(1, dtype=np.int64)
        between = self.bandwidth.copy()
        np.fill_diagonal(between, 0.0)
        slowest = between[~np.eye(count, dtype=bool)].min()
        _, labels = connected_components(csr_matrix(between > slowest * (1 + 1e-9)), directed=False)
        found: NDArray[np.int64] = labels.astype(np.int64)
        return found

    def memory_of(self, members: Members) -> float:
        """Bytes of all GPUs of a group."""
        return float(sum(count * self.memory[node] for node, count in members))


def canonical(cluster: Cluster) -> Cluster:
    """The cluster with its nodes in an order that does not depend on their names or their order in the file.

    Nodes are sorted by their own figures, then by the multiset of links and neighbours (colour refinement), so
    that clusters that differ in naming alone are searched in the same way.
    """
    view = Topology(cluster)
    own = [
        (kind.name, count, link.bandwidth, link.latency, cluster.nic_bandwidth(node), cluster.gpu_price(node))
        for node, (kind, count, link) in enumerate(zip(view.types, view.counts, view.intra, strict=True))
    ]
    colours = _ranks(own)
    bandwidth, latency = view.bandwidth, view.latency
    for _ in range(3):
        refined = []
        for node, colour in enumerate(colours):
            others = np.stack([bandwidth[node], latency[node], colours], axis=1)
            others = np.delete(others, node, axis=0)
            others = others[np.lexsort(others.T)]
            refined.append((int(colour), others.tobytes()))
        colours = _ranks(refined)
    order = np.argsort(colours, kind="stable")
    # Built anew: model_copy would carry over the cached GPU list of the old order.
    return Cluster(
        name=cluster.name,
        nodes=tuple(cluster.nodes[int(node)] for node in order),
        network=cluster.network,
        inline_types=cluster.inline_types,
    )


def _ranks(keys: Sequence[tuple[Any, ...]]) -> NDArray[np.float64]:
    place = {key: index for index, key in enumerate(sorted(set(keys)))}
    return np.array([float(place[key]) for key in keys])
