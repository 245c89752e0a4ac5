"""Plans for goodput: within targets, below throughput and the bound, as good as the exhaustive ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hexgen2.cost import CostModel
from hexgen2.cost.goodput import ATTAINMENT, DEFAULT_TPOT_S, DEFAULT_TTFT_S
from hexgen2.scheduler import Problem, schedule
from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.simulator import poisson, simulate
from hexgen2.specs import InputError, Plan
from hexgen2.specs.plan import Slo

from .support import A100, A6000, H100, L40, SMALL, cluster, lengths, problem

CLUSTERS = {
    "fast and slow": cluster((H100, 2), (L40, 2), gbps=100),
    "three kinds": cluster((A100, 2), (L40, 1), (A6000, 1), gbps=25),
    "slow network": cluster((L40, 1), (L40, 2), gbps=10),
}


def asked(name: str, **more: Any) -> Problem:
    slo = Slo(ttft_s=1.0, tpot_s=0.06)
    return replace(problem(CLUSTERS[name], objective="goodput", slo=slo), **more)


def attainment(plan: Plan, rate: float, count: int = 1500) -> float:
    rng = np.random.default_rng(4)
    load = lengths(count=32)
    rows = rng.integers(len(load), size=count)
    sample = type(load)(load.inputs[rows], load.outputs[rows])
    result = simulate(plan, CostModel(SMALL), poisson(sample, rate, rng))
    return float(result.document()["slo"]["attainment"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_below_throughput_and_the_bound_and_met_in_simulation(name: str) -> None:
    plan = schedule(asked(name))
    most = schedule(asked(name, objective="throughput"))
    assert plan.upper_bound is not None
    assert 0 < plan.objective.value <= most.objective.value * (1 + 1e-9)
    assert plan.objective.value <= plan.upper_bound * (1 + 1e-9)
    assert attainment(plan, plan.objective.value) >= ATTAINMENT - 0.08
    for group in plan.groups:
        assert group.share * plan.throughput_rps <= group.capacity_rps * (1 + 1e-6)


@pytest.mark.parametrize("name", ["fast and slow", "slow network"])
def test_as_good_as_every_plan(name: str) -> None:
    best = schedule(asked(name), solver="exhaustive")
    found = schedule(asked(name))
    assert found.objective.value == pytest.approx(best.objective.value, rel=0.02)


def test_tighter_targets_carry_less() -> None:
    values = [
        schedule(asked("fast and slow", slo=Slo(ttft_s=ttft, tpot_s=tpot))).objective.value
        for ttft, tpot in ((4.0, 0.2), (1.0, 0.06), (0.3, 0.03))
    ]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_defaults_are_said() -> None:
    plan = schedule(asked("slow network", slo=Slo(tpot_s=0.1)))
    assert plan.slo == Slo(ttft_s=DEFAULT_TTFT_S, tpot_s=0.1)
    assert [note for note in plan.notes if "--slo-ttft" in note]
    assert not [note for note in plan.notes if "--slo-tpot" in note]
    assert DEFAULT_TPOT_S > 0


@pytest.mark.parametrize(
    ("ttft", "tpot", "option", "reached"),
    [
        (9.0, 0.9, "--slo-tpot", "no group gives a token every"),
        (0.9, 9.0, "--slo-ttft", "computes 90% of the prompts"),
        (1.001, 1.001, "--slo-ttft", "not met together"),
    ],
)
@pytest.mark.parametrize("solver", ["hexgen2", "colocated"])
def test_targets_out_of_reach(ttft: float, tpot: float, option: str, reached: str, solver: str) -> None:
    """Targets as multiples of what the fastest group of the cluster reaches."""
    evaluator = Evaluator(asked("slow network"), best_rate)
    first, steady = evaluator.fastest(((1, 2),))
    slo = Slo(ttft_s=ttft * first, tpot_s=tpot * steady)
    with pytest.raises(InputError) as error:
        schedule(asked("slow network", slo=slo), solver=solver)
    assert option in str(error.value)
    assert reached in str(error.value)


@pytest.mark.parametrize("solver", ["paper", "distserve", "colocated", "hexgen"])
def test_other_solvers_keep_the_targets_too(solver: str) -> None:
    plan = schedule(asked("fast and slow"), solver=solver)
    best = schedule(asked("fast and slow"))
    assert best.upper_bound is not None
    assert 0 < plan.objective.value <= best.upper_bound * (1 + 1e-9)


@pytest.mark.parametrize("solver", ["distserve", "distserve-pairs"])
def test_layouts_that_a_quick_search_left_out_keep_the_targets_too(solver: str) -> None:
    """DistServe asks for layouts by name: also for those that the quick search of a group did not work out."""
    task = replace(problem(cluster((H100, 8)), load=lengths(600, 100)), objective="goodput", slo=Slo())
    plan = schedule(task, solver=solver)
    assert plan.upper_bound is not None
    assert 0 < plan.objective.value <= plan.upper_bound
