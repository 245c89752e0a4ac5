"""What the simulator says of a case's plan: saturation, latency at a rate, the rate within latency targets.

Rows are JSON objects; times in seconds, rates in requests per second, prices in USD per hour.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from paper_cases import TRACE, WORLDS, Case
from paper_systems import cost_model, plan_of

from hexgen2.simulator import Requests, SimulationResult, offline, poisson, replay, simulate
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan, Slo, parse_plan

Row = dict[str, Any]
TRACE_FILE = Path(__file__).parents[2] / "shared" / "data" / "azure_conv_2023.csv"
TURNOVERS, FEWEST, MOST = 8, 2500, 15_000
"""A saturated run has this many times the requests that the plan's engines answer at once, within these counts:
they all begin at once, and it takes some turnovers until they are spread out."""
ONLINE = 4000
"""Requests of a run at a rate, but for the trace, which is replayed whole."""
ATTAINED = 0.9
"""Part of the requests that must meet both latency targets: DistServe's and the paper's goodput."""
GOODPUT_REQUESTS = 1500
CLOSE = 1.02
"""Goodput is found to this factor."""
DEADLINES = (0.9, 0.95, 0.99)
QUANTILES = 200


def measured(case: Case) -> Row:
    """The case's plan, and its saturation throughput; with targets its goodput too.

    A system that has no plan for the case says so under ``error``.
    """
    row: Row = {
        "key": case.key,
        "system": case.system,
        "cluster": case.cluster,
        "model": case.model,
        "load": case.load,
        "world": case.world,
        "targets": case.targets,
        "links": case.links,
        "limit_s": case.limit_s,
    }
    try:
        plan = plan_of(case)
    except InputError as error:
        return {**row, "error": str(error)}
    row |= {
        "planned_rps": plan.objective.value,
        "upper_bound": plan.upper_bound,
        "plan_s": plan.wall_s,
        "cluster_price": plan.cluster.price_per_hour,
        "h100s": sum(node.count for node in plan.cluster.nodes if node.gpu.startswith("H100")),
        "groups": " ".join(_group(group.role, [stage.tp for stage in group.stages]) for group in plan.groups),
        "plan": plan.document(),
    }
    if case.targets:
        return row | {"goodput_rps": goodput(case, plan)}
    return row | saturated(case, plan)


def saturated(case: Case, plan: Plan) -> Row:
    """Requests/s of a plan that all requests wait for from the start."""
    at_once = sum(group.max_batch for group in plan.groups if group.role != "prefill")
    count = int(min(MOST, max(FEWEST, TURNOVERS * at_once)))
    lengths = load_workload(case.load).sample(count, np.random.default_rng(0))
    ends = simulate(plan, cost_model(case.model, WORLDS[case.world]), offline(lengths)).timeline.end
    done = ends[~np.isnan(ends)]
    return {"rps": steady_rate(done), "failed": count - len(done), "requests": count}


def online(case: Case, document: Row, rate_rps: float) -> Row:
    """Latencies of the case's plan (as a document) at a rate, end to end."""
    plan = parse_plan(document, case.key)
    requests = arrivals(case.load, rate_rps)
    result = simulate(plan, cost_model(case.model, WORLDS[case.world]), requests)
    latencies = _latencies(result)
    finished = latencies[np.isfinite(latencies)]
    figures = result.document()
    # No infinity in JSON: a quantile that was not reached is null.
    quantiles = [deadline(latencies, part) for part in np.linspace(0, 1, QUANTILES + 1)]
    return {
        "rate_rps": rate_rps,
        "mean_s": float(finished.mean()),
        "p99_s": float(np.percentile(finished, 99)),
        "failed": int(len(latencies) - len(finished)),
        "deadlines_s": [_json(deadline(latencies, part)) for part in DEADLINES],
        "quantiles_s": [_json(value) for value in quantiles],
        "ttft_s": figures["ttft_s"],
        "tpot_s": figures["tpot_s"],
    }


def goodput(case: Case, plan: Plan) -> float:
    """The highest Poisson rate at which `ATTAINED` of the requests meet both targets, by bisection; 0: none."""
    assert case.targets is not None
    slo = Slo(ttft_s=case.targets[0], tpot_s=case.targets[1])
    cost = cost_model(case.model, WORLDS[case.world])
    lengths = load_workload(case.load).sample(GOODPUT_REQUESTS, np.random.default_rng(0))

    def meets(rate: float) -> bool:
        requests = poisson(lengths, rate, np.random.default_rng(1))
        return bool(simulate(plan, cost, requests, slo=slo).document()["slo"]["attainment"] >= ATTAINED)

    low, high = 0.5 * plan.objective.value, 2.0 * plan.objective.value
    while not meets(low):
        low, high = low / 2, low
        if low < 0.01 * plan.objective.value:
            return 0.0
    while high / low > CLOSE:
        middle = sqrt(low * high)
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def arrivals(load: str, rate_rps: float) -> Requests:
    """The load at a mean rate: the Azure trace squeezed in time where its file is there, else Poisson."""
    if load == TRACE and TRACE_FILE.is_file():
        return replay(load_workload(str(TRACE_FILE)), rate_rps=rate_rps)
    rng = np.random.default_rng(0)
    return poisson(load_workload(load).sample(ONLINE, rng), rate_rps, rng)


def deadline(latencies: Sequence[float] | np.ndarray, part: float) -> float:
    """The smallest deadline that this part of the requests meets; failed ones (inf) meet none.

    Example: of latencies 1, 2, 3 and 10 s three quarters meet 3 s, and 0.76 of them meet only 10 s.
    """
    ordered = np.sort(np.asarray(latencies, dtype=float))
    if not len(ordered):
        return inf
    needed = max(1, int(np.ceil(part * len(ordered) - 1e-9)))
    return float(ordered[needed - 1])


def steady_rate(ends: np.ndarray) -> float:
    """Requests/s between the first and the last quarter of the ends: neither filling up nor running out.

    Example: 8 ends at 1, 2, … 8 s: from 3 s to 7 s four more end, 1/s.
    """
    ordered = np.sort(ends)
    first, last = len(ordered) // 4, 3 * len(ordered) // 4
    if last <= first or ordered[last] <= ordered[first]:
        return 0.0
    return float((last - first) / (ordered[last] - ordered[first]))


def _latencies(result: SimulationResult) -> np.ndarray:
    spent = result.timeline.end - result.timeline.arrival
    return np.where(np.isnan(spent), inf, spent)


def _group(role: str, tps: Sequence[int]) -> str:
    """A group in short: its role's letter and the TP of each stage."""
    return role[0] + "-".join(map(str, tps))


def _json(value: float) -> float | None:
    return value if np.isfinite(value) else None
