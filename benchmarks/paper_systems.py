"""From a case of paper_cases to a plan: the cluster, the cost model and the search that the case asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paper_cases import SYSTEMS, WORLDS, Case, System, World

from hexgen2.cli.collector import seldom_collected
from hexgen2.cost import CostModel, Efficiencies, Profile, Settings
from hexgen2.cost.profile import default_efficiency
from hexgen2.cost.profile_files import load_profile
from hexgen2.scheduler import Problem, baselines, engine_profile, paper, schedule
from hexgen2.scheduler.evaluate import Evaluator, Option, Rule, best_rate, paper_rule
from hexgen2.scheduler.feasible import check_fits
from hexgen2.scheduler.plan_build import Extras, build
from hexgen2.scheduler.problem import Budget
from hexgen2.scheduler.solution import Solution, assess
from hexgen2.scheduler.topology import canonical
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import Cluster, load_cluster, parse_cluster
from hexgen2.specs.plan import Plan, Slo

CLUSTERS = Path(__file__).parents[1] / "examples" / "clusters"
H100 = "H100-80G-SXM"
H100_PRICE = 3.69
"""USD per hour: the paper's $29.52 for eight, whatever their form."""
GPUS = (H100, "H100-80G-PCIe", "A100-80G-PCIe", "L40", "A6000")
HOST = ("step_overhead_s", "layer_launch_s", "prompt_overhead_s", "sequence_overhead_s")
"""What the host takes, of an `Efficiency`."""


Search = Callable[[Problem, Evaluator, int, Budget], Solution]
BASELINES: dict[str, tuple[Search, Rule]] = {
    "paper": (paper.search, paper_rule),
    "genetic": (baselines.genetic, paper_rule),
    "random-swap": (baselines.random_swap, paper_rule),
    "hexgen": (baselines.hexgen, best_rate),
    "colocated": (baselines.colocated, best_rate),
    "distserve": (baselines.distserve, best_rate),
    "distserve-pairs": (baselines.distserve_pairs, best_rate),
}
"""Every solver but ours: its search, and how it chooses layouts. They are run without the upper bound, which
takes half of the time and is not looked at here."""


def plan_of(case: Case) -> Plan:
    """The plan that the case's system makes; InputError when it has none."""
    system, problem = SYSTEMS[case.system], problem_of(case)
    with seldom_collected():
        if system.solver in BASELINES:
            return _baseline(problem, system, case.limit_s)
        return schedule(problem, solver=system.solver, time_limit_s=case.limit_s, clock=time.process_time)


def problem_of(case: Case) -> Problem:
    """What the case's system is asked."""
    system, world = SYSTEMS[case.system], WORLDS[case.world]
    engine = engine_profile(system.engine)
    if not system.colocated:
        engine = replace(engine, name="disaggregated", colocated=False)
    ttft_s, tpot_s = case.targets or (None, None)
    return Problem(
        cluster=cluster_of(case),
        workload=case.load,
        lengths=load_workload(case.load).representative(256),
        cost=cost_model(case.model, world),
        engine=engine,
        objective="goodput" if case.targets else "throughput",
        slo=Slo(ttft_s=ttft_s, tpot_s=tpot_s),
        init="metis" if system.init == "metis" else "spectral",
        model_name=case.model,
    )


def cost_model(model: str, world: World) -> CostModel:
    """The model's costs in a world. KV caches are moved beside decoding: the systems are not all vLLM."""
    efficiencies = host_bound() if world.host_bound else Efficiencies()
    settings = Settings(chunked_prefill=world.chunked, fetch_between_steps=False)
    return CostModel(load_model(model), efficiencies, settings)


def host_bound() -> Efficiencies:
    """The default efficiencies with the host overheads that were fitted on a measured engine of 2023.

    Its H100s and A100s had hosts of their own; every other type gets those of the A100.
    """
    fitted = load_profile("splitwise-2023").gpus
    gpus = {}
    for name in GPUS:
        kind = gpu_type(name)
        source = fitted[H100 if kind.generation == "hopper" else "A100-80G-SXM"]
        gpus[name] = default_efficiency(kind).model_copy(update={part: getattr(source, part) for part in HOST})
    return Efficiencies([Profile(name="host-bound", source="", date="", engine="", gpus=gpus)])


def cluster_of(case: Case) -> Cluster:
    """The case's cluster: its file, with the world's H100s and the links at their factor."""
    cluster = load_cluster(CLUSTERS / f"{case.cluster}.yaml")
    document = changed(cluster.document(), WORLDS[case.world].h100, case.links)
    return parse_cluster(document, case.cluster)


def changed(document: Mapping[str, Any], h100: str, links: float) -> dict[str, Any]:
    """A cluster's document with another type in the place of its H100s, and all links between nodes scaled."""
    nodes = []
    for node in document["nodes"]:
        node = dict(node)
        if node["gpu"] == H100:
            node |= {"gpu": h100, "price_per_gpu_hour": H100_PRICE}
        if "nic_gbps" in node:
            node["nic_gbps"] *= links
        nodes.append(node)
    network = {**document["network"], "links": [_faster(link, links) for link in document["network"]["links"]]}
    if network.get("default"):
        network["default"] = _faster(network["default"], links)
    return {**document, "nodes": nodes, "network": network}


def _faster(link: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {**link, "gbps": link["gbps"] * factor}


class BlindToLinks(Evaluator):
    """Values routes as if every allowed one carried any load."""

    def route(self, source: Option, target: Option) -> float:
        return 1e6 if super().route(source, target) else 0.0


def _baseline(problem: Problem, system: System, limit_s: float | None) -> Plan:
    """A baseline's plan. Without KV-aware edges its search is blind to links; the plan is valued with them."""
    search, rule = BASELINES[system.solver]
    ordered = replace(problem, cluster=canonical(problem.cluster))
    evaluator = Evaluator(ordered, rule) if system.kv_edges else BlindToLinks(ordered, rule)
    check_fits(evaluator)
    budget = Budget(time.process_time, limit_s)
    solution = search(ordered, evaluator, 0, budget)
    if not system.kv_edges:
        evaluator = Evaluator(ordered, rule)
        valued = assess(evaluator, solution.cells)
        assert valued is not None, "no lower limit was given"
        solution = valued
    extras = Extras(upper_bound=None, counted_singly=True)
    plan = build(ordered, problem.cluster, evaluator, solution, solver=system.solver, seed=0, extras=extras)
    return plan.model_copy(update={"wall_s": budget.spent_s})
