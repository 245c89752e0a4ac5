"""Clusters, loads and plans for the controller's tests: small, and of the planner's own making."""

from __future__ import annotations

from functools import cache
from typing import Any

from hexgen2.controller.assess import Flipping
from hexgen2.controller.carry import Setting
from hexgen2.controller.observe import FleetState, Observation, Spread
from hexgen2.cost import CostModel
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Plan, Role
from hexgen2.specs.workload import Lengths
from tests.scheduler.support import A100, L40, SMALL, cluster, lengths

COST = CostModel(SMALL)
VLLM = PROFILES["vllm"]
ANY_ROLE: frozenset[Role] = frozenset({"prefill", "decode", "colocated"})


@cache
def nodes() -> Cluster:
    """Four nodes of two GPUs of two types."""
    return cluster((A100, 2), (A100, 2), (L40, 2), (L40, 2), gbps=100.0)


@cache
def long_prompts() -> Lengths:
    return lengths(prompt=1500, answer=40)


@cache
def long_answers() -> Lengths:
    return lengths(prompt=150, answer=400)


@cache
def plan(load: str = "prompts", solver: str = "paper") -> Plan:
    """The plan for one of the two loads; `paper` has prefill and decode groups for certain."""
    of = long_prompts() if load == "prompts" else long_answers()
    problem = Problem(nodes(), load, of, COST, VLLM, model_name=SMALL.name)
    return schedule(problem, solver=solver)


def setting(of: Lengths, **more: Any) -> Setting:
    return Setting(nodes(), COST, VLLM, of, **more)


def any_role(of: Plan) -> Flipping:
    """Engines that can take every role."""
    return Flipping({group.id: ANY_ROLE for group in of.groups})


def observation(of: Lengths | None = None, up: frozenset[str] = frozenset(), **more: Any) -> Observation:
    """A steady load that asks for more than is served, unless told otherwise."""
    load = of or long_answers()
    values: dict[str, Any] = {
        "at_s": 1000.0,
        "span_s": 60.0,
        "arrival_rps": 10.0,
        "completed_rps": 5.0,
        "requests": 300,
        "fleet": FleetState(dict.fromkeys(up, 0.0), busy=1.0, queued=10),
        "lengths": load,
        "inputs": Spread.of(load.inputs),
        "outputs": Spread.of(load.outputs),
        "steady": True,
    }
    return Observation(**(values | more))
