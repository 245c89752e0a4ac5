"""Moving the KV cache of a request from its prefill group to its decode group."""

from __future__ import annotations

from collections.abc import Mapping

from hexgen2.cost.layout import PlacedStage, Placement
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.model import Model
from hexgen2.specs.workload import Lengths

Resource = tuple[str, int] | tuple[str, int, int]
"""What transfers share: ("link", node_a, node_b), directed; ("nic_out", node); ("nic_in", node); and, for a
transfer inside a node, ("gpu_out", gpu)."""

Loads = dict[tuple[int, int], float]
"""Bytes by (sending GPU, receiving GPU), indices of the cluster."""


def kv_loads(model: Model, source: Placement, target: Placement, tokens: float) -> Loads:
    """Who sends how many bytes to whom, for the KV cache of ``tokens`` tokens.

    A receiving rank fetches, of every layer it holds, exactly its own KV heads, each from one sender that has
    it. So with at most ``kv_shards`` GPUs in each TP group of the target the loads sum to tokens × KV bytes per
    token. Beyond that (MLA: from 2 GPUs on) the cache is replicated over the receiving ranks, and each replica
    is sent, as vLLM's connectors do.
    """
    head_bytes = model.kv_bytes_per_token_layer / model.kv_shards * tokens
    loads: Loads = {}
    for sender in source:
        for receiver in target:
            first = max(sender.first_layer, receiver.first_layer)
            end = min(sender.first_layer + sender.layers, receiver.first_layer + receiver.layers)
            if first < end:
                for pair, heads in _head_pairs(sender, receiver, model.kv_shards):
                    loads[pair] = loads.get(pair, 0.0) + (end - first) * heads * head_bytes
    return loads


def head_interval(rank: int, tp: int, kv_heads: int) -> tuple[int, int]:
    """KV heads [first, end) that a rank of a TP group holds.

    Up to ``kv_heads`` ranks share them as evenly as whole heads allow; with more ranks each holds one head, and
    neighbouring ranks the same one (as vLLM replicates them).
    """
    if tp >= kv_heads:
        head = rank * kv_heads // tp
        return head, head + 1
    return rank * kv_heads // tp, (rank + 1) * kv_heads // tp


def resources(cluster: Cluster, loads: Mapping[tuple[int, int], float]) -> dict[Resource, float]:
    """Bytes that cross each shared resource; NICs without a limit are left out."""
    shared: dict[Resource, float] = {}
    for (source, target), size in loads.items():
        a, b = cluster.gpus[source].node, cluster.gpus[target].node
        crossed: list[Resource] = [("gpu_out", source)]
        if a != b:
            crossed = [("link", a, b), ("nic_out", a), ("nic_in", b)]
        for resource in crossed:
            if capacity(cluster, resource) != float("inf"):
                shared[resource] = shared.get(resource, 0.0) + size
    return shared


def capacity(cluster: Cluster, resource: Resource) -> float:
    """Bytes per second that a resource carries."""
    if resource[0] == "link":
        return cluster.node_link(resource[1], resource[-1]).bandwidth
    if resource[0] == "gpu_out":
        return cluster.intra_link(cluster.gpus[resource[1]].node).bandwidth
    return cluster.nic_bandwidth(resource[1])


def route_capacity(
    model: Model, cluster: Cluster, source: Placement, target: Placement, lengths: Lengths
) -> float:
    """Requests per second if the route had the network to itself: set by the resource it loads most."""
    loads = kv_loads(model, source, target, float(lengths.inputs.mean()))
    return 1 / _busiest_seconds(cluster, loads)


def transfer_seconds(
    model: Model, cluster: Cluster, source: Placement, target: Placement, tokens: float
) -> float:
    """Seconds to move the KV cache of one request of ``tokens`` tokens over an idle network."""
    loads = kv_loads(model, source, target, tokens)
    return _busiest_seconds(cluster, loads) + max(float(cluster.latency[pair]) for pair in loads)


def _busiest_seconds(cluster: Cluster, loads: Mapping[tuple[int, int], float]) -> float:
    return max(size / capacity(cluster, resource) for resource, size in resources(cluster, loads).items())


def _head_pairs(sender: PlacedStage, receiver: PlacedStage, kv_heads: int) -> list[tuple[tuple[int, int], int]]:
    """((sending GPU, receiving GPU), KV heads) for every receiving rank's heads, each with one sender."""
    pairs: list[tuple[tuple[int, int], int]] = []
    senders = len(sender.gpus)
    for rank, gpu in enumerate(receiver.gpus):
        first, end = head_interval(rank, len(receiver.gpus), kv_heads)
        if senders > kv_heads:  # several senders have each head: spread the receivers over them
            for head in range(first, end):
                owners = [s for s in range(senders) if s * kv_heads // senders == head]
                pairs.append(((sender.gpus[owners[rank % len(owners)]], gpu), 1))
            continue
        for other, owner in enumerate(sender.gpus):
            low, high = head_interval(other, senders, kv_heads)
            common = min(end, high) - max(first, low)
            if common > 0:
                pairs.append(((owner, gpu), common))
    return pairs
