"""What a saved plan does not say yet because it takes a search: other engines' plans, one GPU more."""

from __future__ import annotations

from dataclasses import replace

from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.reasons import stronger
from hexgen2.scheduler.restore import restored
from hexgen2.scheduler.schedule import schedule
from hexgen2.scheduler.shadow import more_gpus
from hexgen2.specs.plan import Plan, Rejection


def with_engines_compared(problem: Problem, plan: Plan) -> Plan:
    """The plan with what stronger engine profiles would serve, each planned from the beginning.

    These take the place of what was said of the same groups under such a profile.
    """
    rule = plan.engine
    found: list[Rejection] = []
    for engine in stronger(problem.engine):
        other = schedule(replace(problem, engine=engine), solver=plan.solver, seed=plan.seed)
        gain = other.objective.value / plan.objective.value - 1
        known = [entry.gain or 0.0 for entry in plan.rejected if entry.rule == rule]
        gain = max([gain, *known])
        change = f"would serve {gain:.1%} more" if gain > 0 else "would serve no more"
        found.append(
            Rejection(rule=rule, detail=f"planned with --engine {engine.name} the cluster {change}", gain=gain)
        )
    kept = [entry for entry in plan.rejected if entry.rule != rule]
    return plan.model_copy(update={"rejected": (*found, *kept)})


def with_more_gpus(problem: Problem, plan: Plan) -> Plan:
    """The plan with what one GPU more of each type would add."""
    sorted_problem, _, solution = restored(problem, plan)
    found = more_gpus(sorted_problem, solution.cells, plan.objective.value, plan.seed)
    kept = tuple(price for price in plan.shadow_prices if price.kind != "gpu")
    return plan.model_copy(update={"shadow_prices": (*found, *kept)})
