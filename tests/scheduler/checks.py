"""An independent check of plans: written from the plan's JSON and the spec alone, sharing no planner code."""

from __future__ import annotations

from collections import defaultdict

from hexgen2.specs.cluster import Cluster
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Group, Plan
from hexgen2.specs.workload import Lengths

TOLERANCE = 1e-6


def check_plan(plan: Plan, model: Model, lengths: Lengths) -> None:
    """Assert what must hold of every plan of every solver, under this load."""
    assert plan.groups
    used = [gpu for group in plan.groups for gpu in group.gpus]
    assert len(used) == len(set(used)), "a GPU stands in two groups"
    assert set(used) <= set(plan.cluster.gpu_by_id)
    for group in plan.groups:
        assert sum(stage.layers for stage in group.stages) == model.layers
        check_memory(group, plan.cluster, model)
    check_flow(plan)
    check_network(plan, model, float(lengths.inputs.mean()))


def check_memory(group: Group, cluster: Cluster, model: Model) -> None:
    """Weights, split evenly over each stage's GPUs, fit into nine tenths of the smallest GPU's memory."""
    for place, stage in enumerate(group.stages):
        params = sum(model.layer_params(stage.first_layer + layer) for layer in range(stage.layers))
        if place == 0:
            params += model.vocab_size * model.hidden_size
        if place == len(group.stages) - 1 and not (model.tied_embeddings and place == 0):
            params += model.vocab_size * model.hidden_size
        smallest = min(cluster.gpu_by_id[gpu].type.memory_bytes for gpu in stage.gpus)
        assert params * model.weight_bytes / stage.tp <= 0.9 * smallest, f"{group.id} does not fit"


def check_flow(plan: Plan) -> None:
    """Shares sum to 1, are conserved through every group, and stay within groups' and routes' capacities."""
    throughput = plan.throughput_rps
    out: dict[str, float] = defaultdict(float)
    into: dict[str, float] = defaultdict(float)
    for route in plan.routes:
        out[route.source] += route.share
        into[route.target] += route.share
        assert route.share > 0
        assert abs(route.rps - route.share * throughput) <= TOLERANCE * throughput
        assert route.rps <= route.capacity_rps * (1 + TOLERANCE)
    whole = sum(route.share for route in plan.routes)
    for group in plan.groups:
        carried = {"prefill": out, "decode": into}.get(group.role)
        if carried is None:
            whole += group.share
        else:
            assert abs(carried[group.id] - group.share) <= TOLERANCE
        assert group.share * throughput <= group.capacity_rps * (1 + TOLERANCE)
    assert abs(whole - 1) <= TOLERANCE
    assert plan.upper_bound is None or plan.objective.value <= plan.upper_bound * (1 + TOLERANCE)


def check_network(plan: Plan, model: Model, mean_input: float) -> None:
    """Bytes per second on every pair of nodes, NIC and sending GPU, from the plan's layers and heads."""
    cluster = plan.cluster
    pairs: dict[tuple[int, int], float] = defaultdict(float)
    sent: dict[int, float] = defaultdict(float)
    received: dict[int, float] = defaultdict(float)
    ports: dict[str, float] = defaultdict(float)
    for route in plan.routes:
        source, target = plan.group_by_id[route.source], plan.group_by_id[route.target]
        for layer in range(model.layers):
            giving = _holders(source, layer, model.kv_shards)
            taking = _holders(target, layer, model.kv_shards)
            for head in range(model.kv_shards):
                owners = giving[head]
                for rank, receiver in taking[head]:
                    # Receivers spread over the owners of a replicated head, each reading one of them.
                    sender = owners[rank % len(owners)][1]
                    a, b = cluster.gpu_by_id[sender].node, cluster.gpu_by_id[receiver].node
                    size = model.kv_bytes_per_token_layer / model.kv_shards * mean_input * route.rps
                    if a == b:
                        ports[sender] += size
                    else:
                        pairs[a, b] += size
                        sent[a] += size
                        received[b] += size
    for (a, b), load in pairs.items():
        assert load <= cluster.node_link(a, b).bandwidth * (1 + TOLERANCE), f"link {a}→{b} is overloaded"
    for gpu, load in ports.items():
        inside = cluster.intra_link(cluster.gpu_by_id[gpu].node).bandwidth
        assert load <= inside * (1 + TOLERANCE), f"the port of GPU {gpu} is overloaded"
    for node, load in [*sent.items(), *received.items()]:
        assert load <= cluster.nic_bandwidth(node) * (1 + TOLERANCE), f"NIC of node {node} is overloaded"


def _holders(group: Group, layer: int, kv_heads: int) -> dict[int, list[tuple[int, str]]]:
    """KV head → (rank, GPU) that hold it of a layer."""
    stage = next(s for s in group.stages if s.first_layer <= layer < s.first_layer + s.layers)
    holders: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for rank, gpu in enumerate(stage.gpus):
        if stage.tp >= kv_heads:
            holders[rank * kv_heads // stage.tp].append((rank, gpu))
        else:
            for head in range(rank * kv_heads // stage.tp, (rank + 1) * kv_heads // stage.tp):
                holders[head].append((rank, gpu))
    return holders
