"""Group templates for the master program: which GPUs of which kinds of node, in which role, at what rate.

Nodes of equal type, GPU count, inner link and NIC are of one *kind*. A column is a group on one or a few kinds;
its rate is that on the best linked nodes of these kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, product
from math import prod

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.evaluate import Evaluator, Option
from hexgen2.scheduler.topology import Members, Topology, members_of
from hexgen2.specs.plan import ROLES, Role

Parts = tuple[tuple[int, int], ...]
"""(kind, GPUs of one node of it), one entry per node, sorted."""
SMALL_NODES = 4
"""Nodes up to which groups over any of them are templates; in larger clusters groups span two, or like ones."""
MOST_VECTORS = 400
"""GPU counts by node that such groups may have at most: four nodes of eight GPUs would have 6,561."""
FINE_NODES = 24
"""Nodes up to which the search tells each from every other, and a group may span nodes of two communities."""
MANY_NODES = 10
"""Nodes beyond which a group that spans two takes only powers of two, or all, of each."""


@dataclass(frozen=True, slots=True)
class Column:
    """A group template. ``spread`` (kinds,): the part of the KV cache that each kind's nodes hold."""

    parts: Parts
    role: Role
    rps: float
    spread: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Kinds:
    """The kinds of nodes of a topology; ``by_community``: those of different communities differ in kind.

    ``labels`` (N,): so do those of different labels, and the kinds are in the order of the labels.
    """

    topology: Topology
    by_community: bool = False
    labels: tuple[int, ...] = ()

    @cached_property
    def of_node(self) -> tuple[int, ...]:
        """Each node's kind."""
        topology = self.topology
        keys = [
            (
                self.labels[node] if self.labels else 0,
                int(kind),
                count,
                topology.cluster.nic_bandwidth(node),
                int(topology.community[node]) if self.by_community else 0,
            )
            for node, (kind, count) in enumerate(zip(topology.node_class, topology.counts, strict=True))
        ]
        place = {key: number for number, key in enumerate(sorted(set(keys)))}
        return tuple(place[key] for key in keys)

    @cached_property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """Each kind's nodes."""
        return tuple(
            tuple(node for node, kind in enumerate(self.of_node) if kind == number)
            for number in range(max(self.of_node) + 1)
        )

    @cached_property
    def community(self) -> tuple[int, ...]:
        """Each kind's community; -1 where its nodes are of several."""
        found = [{int(self.topology.community[node]) for node in nodes} for nodes in self.nodes]
        return tuple(next(iter(numbers)) if len(numbers) == 1 else -1 for numbers in found)

    @cached_property
    def alike(self) -> tuple[tuple[int, ...], ...]:
        """Kinds whose nodes are alike in type, count and community (those that differ by label alone)."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for kind, nodes in enumerate(self.nodes):
            key = (int(self.topology.node_class[nodes[0]]), self.count(kind), self.community[kind])
            groups.setdefault(key, []).append(kind)
        return tuple(map(tuple, groups.values()))

    def count(self, kind: int) -> int:
        """GPUs of one node of a kind."""
        return self.topology.counts[self.nodes[kind][0]]

    def best_nodes(
        self, parts: Parts, free: NDArray[np.int64] | None = None, wish: NDArray[np.float64] | None = None
    ) -> Members | None:
        """The best linked nodes for the parts with that many GPUs free; None where there are none.

        ``wish`` (N,) decides between equally linked nodes: the highest first. Then the fullest node that still
        has room, so that whole nodes stay whole.
        """
        left = np.array(self.topology.counts) if free is None else free
        wanted = np.zeros(len(left)) if wish is None else wish
        options = [
            np.array([node for node in self.nodes[kind] if left[node] >= gpus], dtype=np.int64)
            for kind, gpus in parts
        ]
        if any(len(nodes) == 0 for nodes in options):
            return None
        if len(parts) == 1:
            node = min(options[0], key=lambda place: (-wanted[place], left[place], place))
            return ((int(node), parts[0][1]),)
        bandwidth = self.topology.bandwidth
        chosen: list[int] = []
        pairs = bandwidth[np.ix_(options[0], options[1])].copy()
        pairs[options[0][:, None] == options[1][None, :]] = 0.0
        best = np.argwhere(pairs >= pairs.max() * (1 - 1e-9))
        worth = wanted[options[0][best[:, 0]]] + wanted[options[1][best[:, 1]]]
        first, second = best[int(np.argmax(worth))]
        chosen = [int(options[0][first]), int(options[1][second])]
        if chosen[0] == chosen[1]:
            return None
        for nodes in options[2:]:
            others = [int(node) for node in nodes if int(node) not in chosen]
            if not others:
                return None
            chosen.append(max(others, key=lambda node: (min(bandwidth[node, at] for at in chosen), -node)))
        return members_of({node: gpus for node, (_, gpus) in zip(chosen, parts, strict=True)})


def columns(evaluator: Evaluator, kinds: Kinds, roles: tuple[Role, ...] = ROLES) -> list[Column]:
    """Every template that holds a replica, in every role."""
    found: list[Column] = []
    for parts in part_lists(evaluator, kinds):
        members = kinds.best_nodes(parts)
        if members is None:
            continue
        for role in roles:
            option = evaluator.choose(members, role)
            if option is not None:
                found.append(Column(parts, role, option.rps, spread(kinds, option)))
    return found


def spread(kinds: Kinds, option: Option) -> tuple[tuple[int, float], ...]:
    """Kind → part of the KV cache held on its nodes."""
    total = sum(stage.layers for stage in option.template)
    held: dict[int, float] = {}
    for stage in option.template:
        for node, count in stage.members:
            kind = kinds.of_node[node]
            held[kind] = held.get(kind, 0.0) + stage.layers / total * count / stage.tp
    return tuple(sorted(held.items()))


def part_lists(evaluator: Evaluator, kinds: Kinds) -> Iterator[Parts]:
    """Which parts groups are made of."""
    counts = evaluator.topology.counts
    number = len(kinds.nodes)
    if len(counts) <= SMALL_NODES and prod(count + 1 for count in counts) <= MOST_VECTORS:
        seen = set()
        for vector in product(*(range(count + 1) for count in counts)):
            parts = tuple(sorted((kinds.of_node[node], gpus) for node, gpus in enumerate(vector) if gpus))
            if parts and parts not in seen:
                seen.add(parts)
                yield parts
        return
    single = {kind: _sizes(kinds, kind, coarse=len(kinds.nodes[kind]) > 1) for kind in range(number)}
    for kind in range(number):
        yield from (((kind, gpus),) for gpus in single[kind])
    many = len(counts) > MANY_NODES
    coarse = {kind: _sizes(kinds, kind, coarse=many) for kind in range(number)}
    for a, b in combinations_with_replacement(range(number), 2):
        if a == b and len(kinds.nodes[a]) == 1:
            continue
        if len(counts) > FINE_NODES and kinds.community[a] != kinds.community[b]:
            continue
        pairs = {tuple(sorted(((a, s), (b, t)))) for s in coarse[a] for t in coarse[b]}
        yield from sorted(pairs)
    for like in kinds.alike:
        each = [kind for kind in like for _ in kinds.nodes[kind]]
        for nodes in (3, 4):
            runs = {tuple(each[at : at + nodes]) for at in range(len(each) - nodes + 1)}
            yield from (tuple((kind, kinds.count(kind)) for kind in run) for run in sorted(runs))


def _sizes(kinds: Kinds, kind: int, *, coarse: bool) -> list[int]:
    """GPUs of a node that a group may take: any number, or (so that nodes fill up) powers of two and all."""
    count = kinds.count(kind)
    return [size for size in range(1, count + 1) if not coarse or size & (size - 1) == 0 or size == count]
