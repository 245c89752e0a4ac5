"""Layouts of a serving group: which GPUs form a stage, in which order, with how many layers each.

Tensor parallelism stays inside a node, the pipeline goes across nodes along the fastest path; a single stage
over all GPUs of several nodes is the one exception (for engines whose decode groups may not be pipelines).
Layers are dealt by water-filling over the stages' speeds, under what their memories hold.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, permutations, product
from math import prod

from hexgen2.cost.layout import Layout, StageShape
from hexgen2.scheduler.stage_values import Room, StageKind, StageValues
from hexgen2.scheduler.topology import Members, Topology, size
from hexgen2.specs.gpu import Link, weakest
from hexgen2.specs.model import Model

Cuts = tuple[tuple[int, ...], ...]
MAX_CHAINS = 48
"""Ways to cut a group into stages, for one order of its nodes; beyond it only equal TP sizes are combined."""
MAX_ORDERED = 3
MAX_REORDERED = 4
MAX_PERMUTED = 6
"""Nodes up to which every pipeline order is compared; beyond it the next node is the nearest one."""


@dataclass(frozen=True, slots=True)
class StageTemplate:
    """A stage: how many GPUs of which node, and how many layers."""

    members: Members
    layers: int

    @property
    def tp(self) -> int:
        return sum(count for _, count in self.members)


Template = tuple[StageTemplate, ...]
"""The ordered stages of a group on nodes, before real GPUs are dealt."""


def valid_tps(model: Model, most: int) -> tuple[int, ...]:
    """TP sizes up to ``most`` that split the heads evenly and the KV heads evenly or into equal copies."""
    sizes = [tp for tp in range(1, most + 1) if model.heads % tp == 0]
    if model.mla is not None:
        return tuple(sizes)
    return tuple(tp for tp in sizes if model.kv_heads % tp == 0 or tp % model.kv_heads == 0)


def water_fill(total: int, weights: Sequence[float], limits: Sequence[int]) -> tuple[int, ...] | None:
    """``total`` layers over stages so that the largest layers / weight is least; None when they do not fit.

    Every stage gets at least one layer and at most its limit. Exact: starting from the whole parts of an even
    fill that no better deal goes below, each further layer goes where the ratio stays lowest.

    >>> water_fill(80, [2.0, 1.0, 1.0], [80, 80, 80])
    (40, 20, 20)
    >>> water_fill(80, [2.0, 1.0, 1.0], [30, 80, 80])
    (30, 25, 25)
    """
    if total < len(weights) or any(limit < 1 for limit in limits) or sum(limits) < total:
        return None
    share = total / sum(weights)
    layers = [
        max(1, min(limit, int(weight * share) - 1)) for weight, limit in zip(weights, limits, strict=True)
    ]
    left = total - sum(layers)
    if left < 0:  # many slow stages: their minimum of one layer is more than their part
        layers, left = [1] * len(weights), total - len(weights)
    heap = [
        ((count + 1) / weight, place)
        for place, (count, weight, limit) in enumerate(zip(layers, weights, limits, strict=True))
        if count < limit
    ]
    heapq.heapify(heap)
    for _ in range(left):
        _, place = heapq.heappop(heap)
        layers[place] += 1
        if layers[place] < limits[place]:
            heapq.heappush(heap, ((layers[place] + 1) / weights[place], place))
    return tuple(layers)


@cache
def count_partitions(total: int, sizes: tuple[int, ...]) -> int:
    """Ways to write ``total`` as a sum of the given sizes: 10 for 8 of 1, 2, 4 and 8, over 10⁸ for 1,024 of
    powers of two, which is why they are counted before they are listed."""
    ways = [1] + [0] * total
    for part in sizes:
        for reached in range(part, total + 1):
            ways[reached] += ways[reached - part]
    return ways[total]


@cache
def _widest(total: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The first of `_partitions`, without the others."""
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ())] + [None] * total
    for part in sorted(sizes):  # the parts so far are no larger than this one, which comes before them
        for reached in range(part, total + 1):
            rest, known = best[reached - part], best[reached]
            if rest is not None and (known is None or (rest[0] + 1, (part, *rest[1])) < known):
                best[reached] = (rest[0] + 1, (part, *rest[1]))
    found = best[total]
    assert found is not None, "one GPU is a size"
    return found[1]


@cache
def _partitions(total: int, sizes: tuple[int, ...]) -> Cuts:
    """Ways to write ``total`` as a sum of the given sizes, parts descending, fewest parts first."""

    def parts(left: int, largest: int) -> Iterator[tuple[int, ...]]:
        if left == 0:
            yield ()
        for part in sizes:
            if part <= min(left, largest):
                for rest in parts(left - part, part):
                    yield (part, *rest)

    return tuple(sorted(parts(total, total), key=lambda found: (len(found), found)))


@cache
def _orders(total: int, sizes: tuple[int, ...]) -> Cuts:
    """The same in every order of the parts where these are few, else in falling and in rising order."""
    found: list[tuple[int, ...]] = []
    for cut in _partitions(total, sizes):
        if len(cut) <= MAX_REORDERED:
            found += sorted(set(permutations(cut)))
        else:
            found += sorted({cut, cut[::-1]})
    return tuple(found)


def pipeline_order(topology: Topology, nodes: Sequence[int]) -> tuple[int, ...]:
    """The nodes along the path whose slowest link is fastest (then the fastest in sum)."""

    def cost(path: Sequence[int]) -> tuple[float, float]:
        seconds = [1 / topology.bandwidth[a, b] for a, b in pairwise(path)]
        return max(seconds, default=0.0), sum(seconds)

    if len(nodes) <= 2:
        return tuple(nodes)
    if len(nodes) <= MAX_PERMUTED:
        forward = (path for path in permutations(nodes) if path[0] < path[-1])
        return min(forward, key=cost)
    path = [nodes[0]]
    left = set(nodes[1:])
    while left:
        nearest = max(left, key=lambda node: (topology.bandwidth[path[-1], node], -node))
        path.append(nearest)
        left.remove(nearest)
    return tuple(path)


def chains(
    topology: Topology, members: Members, sizes: tuple[int, ...], *, thorough: bool = False
) -> Iterator[tuple[Members, ...]]:
    """Ways to cut a group's GPUs into ordered stages (each a small group of members).

    ``thorough``: for groups on up to `MAX_ORDERED` nodes every order of the nodes and of unlike stages inside
    a node, since the ends of a pipeline carry the embedding and the LM head too.
    """
    nodes = [node for node, _ in members]
    if len(nodes) > 1 and size(members) in sizes:
        yield (members,)
    if not thorough or len(nodes) > MAX_ORDERED:
        yield from _along(members, pipeline_order(topology, nodes), sizes)
        return
    seen = set()
    for order in permutations(nodes):
        for chain in _along(members, order, sizes, reordered=True):
            if chain not in seen:
                seen.add(chain)
                yield chain


def _along(
    members: Members, order: tuple[int, ...], sizes: tuple[int, ...], *, reordered: bool = False
) -> Iterator[tuple[Members, ...]]:
    """Chains along one order of the nodes; ``reordered``: with the parts of a node in every order."""
    counts = dict(members)
    cut = _orders if reordered else _partitions
    listed = all(count_partitions(count, sizes) <= MAX_CHAINS for count in counts.values())
    choices = [cut(counts[node], sizes) for node in order] if listed else []
    if not listed or prod(map(len, choices)) > MAX_CHAINS:
        for tp in sizes:
            if all(count % tp == 0 for count in counts.values()):
                yield tuple(((node, tp),) for node in order for _ in range(counts[node] // tp))
        widest = [_widest(counts[node], sizes)[:: -1 if reordered else 1] for node in order]
        yield tuple(((node, tp),) for node, parts in zip(order, widest, strict=True) for tp in parts)
        return
    for cuts in product(*choices):
        yield tuple(((node, tp),) for node, parts in zip(order, cuts, strict=True) for tp in parts)


def roomiest(total: int, rooms: Sequence[Room]) -> tuple[int, ...]:
    """The deal that leaves room for the most tokens of KV cache; what is over is taken from the fullest stages.

    Expects that ``total`` layers fit with an empty cache and that every stage holds one.
    """
    low, high = 0.0, max(room.free / room.per_token for room in rooms)
    for _ in range(40):
        middle = (low + high) / 2
        fitting = [room.layers(middle) for room in rooms]
        if min(fitting) >= 1 and sum(fitting) >= total:
            low = middle
        else:
            high = middle
    layers = [room.layers(low) for room in rooms]
    for _ in range(sum(layers) - total):
        more = [stage for stage, count in enumerate(layers) if count > 1]
        layers[max(more, key=lambda stage: (layers[stage] / rooms[stage].layers(0.0), stage))] -= 1
    return tuple(layers)


def layer_splits(
    values: StageValues, chain: Sequence[StageKind], *, thorough: bool = False
) -> Iterator[tuple[int, ...]]:
    """Deals of the model's layers over a chain: by compute, by memory bandwidth and by memory size.

    ``thorough``: also the one with the most room for KV cache.
    """
    layers = values.cost.model.layers
    final = len(chain) - 1
    if final == 0:
        yield (layers,)
        return
    rooms = [
        values.room(kind, first=place == 0, last=place == final, alone=False)
        for place, kind in enumerate(chain)
    ]
    limits = [int(room.free // room.per_layer) for room in rooms]
    if min(limits) < 1 or sum(limits) < layers:
        return
    compute = [kind.compute for kind in chain]
    bandwidth = [kind.bandwidth for kind in chain]
    # per_layer is of the fullest GPU: free / per_layer is the same for any TP in proportion to its GPUs.
    memory = [room.free / room.per_layer for room in rooms]
    seen = set()
    for weights in (compute, bandwidth, memory):
        split = water_fill(layers, weights, limits)
        if split is not None and split not in seen:
            seen.add(split)
            yield split
    if thorough:
        split = roomiest(layers, rooms)
        if split not in seen:
            yield split


def templates(values: StageValues, members: Members, sizes: tuple[int, ...]) -> Iterator[Template]:
    """Every layout of a group that is worth evaluating."""
    for chain in chains(values.topology, members, sizes):
        for layers in layer_splits(values, [values.kind(part) for part in chain]):
            yield tuple(map(StageTemplate, chain, layers))


def layout_of(topology: Topology, template: Template) -> Layout:
    """The template as the cost model sees it (equal to `cost.layout.shape` of any of its placements)."""
    shapes: list[StageShape] = []
    before: Members = ()
    for stage in template:
        nodes = [node for node, _ in stage.members]
        inside = [(node, node) for node, count in stage.members if count > 1]
        inside += [(a, b) for place, a in enumerate(nodes) for b in nodes[:place]]
        upstream = [(a, b) for a, _ in before for b in nodes]
        link: Link | None = topology.slowest(inside) if stage.tp > 1 else None
        gpu = weakest([topology.types[node] for node in nodes])
        shapes.append(StageShape(gpu, stage.tp, stage.layers, link, topology.slowest(upstream)))
        before = stage.members
    return tuple(shapes)
