"""From a command's arguments to a scheduling problem."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from hexgen2.cost import CostModel
from hexgen2.cost.profile_files import lasting_name, load_efficiencies
from hexgen2.scheduler import Problem, engine_profile
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import Cluster, load_cluster
from hexgen2.specs.plan import Plan, Slo, check_groups

PLANNING_LENGTHS = 256
"""Representative requests that stand for a workload in the cost model."""


def load_problem(args: argparse.Namespace) -> Problem:
    """The problem that ``plan`` was asked."""
    problem = problem_for(args, load_cluster(args.cluster), str(args.cluster), rate=args.rate)
    return replace(problem, init=args.init)


def problem_for(args: argparse.Namespace, cluster: Cluster, source: str, rate: float | None) -> Problem:
    """The problem of a command's arguments on a cluster, which messages call ``source``."""
    model = load_model(args.model)
    directory = Path(args.model)
    return Problem(
        cluster=cluster,
        workload=args.workload,
        lengths=load_workload(args.workload).representative(PLANNING_LENGTHS),
        cost=CostModel(model, load_efficiencies(args.profile)),
        engine=engine_profile(args.engine),
        objective=args.objective,
        slo=Slo(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot),
        rate=rate,
        # A directory is kept as a whole path, so that the plan can be served from anywhere.
        model_name=str(directory.resolve()) if directory.is_dir() else args.model,
        source=source,
        profiles=tuple(map(lasting_name, args.profile)),
    )


def problem_of(plan: Plan) -> Problem:
    """The problem that a saved plan answers; its model, workload and profiles are read again."""
    model = load_model(plan.model)
    check_groups(plan, model, "plan")
    return Problem(
        cluster=plan.cluster,
        workload=plan.workload,
        lengths=load_workload(plan.workload).representative(PLANNING_LENGTHS),
        cost=CostModel(model, load_efficiencies(plan.profiles)),
        engine=engine_profile(plan.engine),
        objective=plan.objective.name,
        slo=plan.slo,
        init=plan.init,
        model_name=plan.model,
        source=plan.cluster.name,
        profiles=plan.profiles,
    )
