"""Plans by hand, which the planner's are compared with: equal splits, and round robin over the same groups."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from testbed_clusters import MODEL

from hexgen2.coordinator import CoordinatorConfig
from hexgen2.cost import CostModel, PlacedStage, shape
from hexgen2.simulator import offline, simulate
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Plan, Role, parse_plan

LETTER: Mapping[Role, str] = {"prefill": "p", "decode": "d", "colocated": "c"}
REQUESTS = 300
"""Simulated to choose among equal splits."""


def equal_plan(cluster: Cluster, roles: Mapping[str, Role], workload: str, cost: CostModel) -> Plan:
    """A group on the device of each node, in the roles given by node; every group of a role gets as many
    requests as the others of it, from all sides alike."""
    members = {role: [node for node, its in roles.items() if its == role] for role in LETTER}
    pairs = list(product(range(len(members["prefill"])), range(len(members["decode"]))))
    colocated = len(members["colocated"]) / len(roles)
    groups = [
        {
            "id": f"{LETTER[role]}{place}",
            "role": role,
            "share": (colocated if role == "colocated" else 1 - colocated) / len(nodes),
            "price_per_hour": 0.0,
            "capacity_rps": 0.0,
            "max_batch": _max_batch(cluster, node, role, workload, cost),
            "stages": [{"gpus": [f"{node}/0"], "tp": 1, "first_layer": 0, "layers": cost.model.layers}],
        }
        for role, nodes in members.items()
        for place, node in enumerate(nodes)
    ]
    routes = [
        {"from": f"p{a}", "to": f"d{b}", "share": (1 - colocated) / len(pairs), "rps": 0.0, "capacity_rps": 0.0}
        for a, b in pairs
    ]
    document: dict[str, Any] = {
        "version": 1,
        "cluster": cluster.document(),
        "model": MODEL,
        "workload": workload,
        "engine": "vllm",
        "solver": "by hand",
        "seed": 0,
        "objective": {"name": "throughput", "value": 0.0, "unit": "requests/s"},
        "throughput_rps": 0.0,
        "output_tokens_per_s": 0.0,
        "price_per_hour": 0.0,
        "wall_s": 0.0,
        "groups": groups,
        "routes": routes,
        "bottleneck": {"elements": [], "text": ""},
    }
    return parse_plan(document, "equal plan")


def best_equal(cluster: Cluster, workload: str, cost: CostModel, *, colocated: bool) -> Plan:
    """The equal split that serves a backlog fastest in simulation, over all ways to give devices roles; one of
    prefill and decode groups, or with ``colocated`` the one of colocated groups as well. As it is run then
    (`round_robin`), nothing is held back."""
    nodes = [node.name for node in cluster.nodes]
    choices: list[tuple[Role, ...]] = list(product(("prefill", "decode"), repeat=len(nodes)))
    choices = [roles for roles in choices if len(set(roles)) == 2]
    if colocated:
        everywhere: Role = "colocated"
        choices.append((everywhere,) * len(nodes))
    plans = [equal_plan(cluster, dict(zip(nodes, roles, strict=True)), workload, cost) for roles in choices]
    lengths = load_workload(workload).sample(REQUESTS, np.random.default_rng(0))
    backlog = offline(lengths)

    def throughput(plan: Plan) -> float:
        return float(
            simulate(plan, cost, backlog, load_correction=0.0, hold_back=False).document()["throughput_rps"]
        )

    return max(plans, key=throughput)


def round_robin(config: CoordinatorConfig) -> CoordinatorConfig:
    """The same engines behind a proxy that knows no shares and no load: each pair of a prefill and a decode
    engine, and each colocated engine, gets every n-th request."""
    roles = {role: [one.group_id for one in config.engines if one.role == role] for role in LETTER}
    pairs = list(product(roles["prefill"], roles["decode"]))
    part = 1 / (len(pairs) + len(roles["colocated"]))
    engines = [
        one.model_copy(
            update={
                "share": part
                * {"prefill": len(roles["decode"]), "decode": len(roles["prefill"])}.get(one.role, 1)
            }
        )
        for one in config.engines
    ]
    document = config.model_dump(mode="json")
    document["engines"] = [one.model_dump(mode="json") for one in engines]
    document["routes"] = [{"prefill": a, "decode": b, "share": part} for a, b in pairs]
    document["classes"] = []
    document["limits"] |= {"load_correction": 0.0, "capacity_factor": 1000.0}
    return CoordinatorConfig.model_validate(document)


def _max_batch(cluster: Cluster, node: str, role: Role, workload: str, cost: CostModel) -> int:
    """The sequences that a device runs at once in a role, as the planner reckons."""
    index = [one.name for one in cluster.nodes].index(node)
    layout = shape(cluster, (PlacedStage((cluster.first_gpu(index),), 0, cost.model.layers),))
    lengths = load_workload(workload).representative(256)
    if role == "prefill":
        return cost.prefill_capacity(layout, lengths).max_batch
    if role == "decode":
        return cost.decode_capacity(layout, lengths).max_batch
    return cost.colocated_capacity(layout, lengths).max_batch
