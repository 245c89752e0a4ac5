"""The GPUs left to our planner: what `hexgen2 budget` rents for the paper's price and for 70% of it.

The market has the paper's four GPU types in nodes of the sizes of its settings, at the prices of the catalog
(H100: the paper's), on a network like that of examples/clusters/mixed-1.yaml.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paper_cases import CHEAPER, HOMOGENEOUS, Case
from paper_measure import saturated
from paper_systems import cluster_of, problem_of

from hexgen2.scheduler.budget import Asked, Rented, budget
from hexgen2.specs.offers import parse_offers

Row = dict[str, Any]
MARKET = {
    "name": "the paper's GPU types",
    "offers": [
        {"name": "h100-node", "gpu": "H100-80G-SXM", "count": 8, "available": 1},
        {"name": "h100-pair", "gpu": "H100-80G-SXM", "count": 2, "available": 4, "nic_gbps": 100},
        {"name": "a100", "gpu": "A100-80G-PCIe", "count": 4, "available": 4, "nic_gbps": 50},
        {"name": "l40", "gpu": "L40", "count": 4, "available": 6, "nic_gbps": 40},
        {"name": "a6000", "gpu": "A6000", "count": 4, "available": 6, "nic_gbps": 25},
    ],
    "network": {"default": {"gbps": 25, "latency_ms": 0.2}},
}


def rented(model: str, load: str) -> Row:
    """What is rented for the price of the 8 H100, and the best of at most setting 5's price among what was
    planned on the way."""
    case = Case("ours", HOMOGENEOUS, model, load)
    problem = problem_of(case)
    full = problem.cluster.price_per_hour
    less = cluster_of(replace(case, cluster=CHEAPER)).price_per_hour
    answer = budget(problem, parse_offers(MARKET, "the market of paper.py"), Asked(hourly=full))
    cheap = [mix for mix in answer.frontier if mix.price <= less]
    best = max(cheap, key=lambda mix: mix.rps, default=None)
    return {
        "model": model,
        "load": load,
        "full": _figures(case, answer.best),
        "less": None if best is None else _figures(case, best),
    }


def _figures(case: Case, mix: Rented) -> Row:
    counts: dict[str, int] = {}
    for node in mix.plan.cluster.nodes:
        counts[node.gpu] = counts.get(node.gpu, 0) + node.count
    roles = "".join(sorted(group.role[0] for group in mix.plan.groups))
    return {
        "planned_rps": mix.rps,
        "price": mix.price,
        "gpus": counts,
        "roles": roles,
        **saturated(case, mix.plan),
    }
