"""What a plan is said to do at a rate, against the simulator and against itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hexgen2.cost.memory import Settings
from hexgen2.cost.replica import CostModel
from hexgen2.report.words import rate_lines
from hexgen2.scheduler import Problem, schedule
from hexgen2.scheduler.prediction import predict
from hexgen2.simulator import poisson, simulate
from hexgen2.specs import Plan, parse_plan
from hexgen2.specs.plan import Slo

from .support import H100, L40, cluster, lengths, problem


@pytest.fixture(scope="module")
def asked() -> Problem:
    return problem(
        cluster((H100, 2), (L40, 2), gbps=100),
        objective="goodput",
        slo=Slo(ttft_s=1.0, tpot_s=0.06),
    )


@pytest.fixture(scope="module")
def plan(asked: Problem) -> Plan:
    return schedule(asked)


@pytest.mark.parametrize("solver", ["hexgen2", "distserve"])
@pytest.mark.parametrize("part", [0.4, 0.8])
def test_latencies_are_about_those_of_the_simulator(asked: Problem, solver: str, part: float) -> None:
    plan = schedule(asked, solver=solver)
    rate = part * plan.objective.value
    rng = np.random.default_rng(2)
    load = lengths()
    rows = rng.integers(len(load), size=2500)
    requests = poisson(type(load)(load.inputs[rows], load.outputs[rows]), rate, rng)
    seen = simulate(plan, asked.cost, requests).document()
    said = predict(asked, plan, rate)
    assert said.carried
    assert said.ttft_s is not None
    assert said.tpot_s is not None
    assert said.attainment == pytest.approx(seen["slo"]["attainment"], abs=0.05)
    assert said.tpot_s.mean == pytest.approx(seen["tpot_s"]["mean"], rel=0.1)
    assert said.tpot_s.p90 == pytest.approx(seen["tpot_s"]["p90"], rel=0.15)
    assert said.ttft_s.p50 == pytest.approx(seen["ttft_s"]["p50"], rel=0.6)
    assert said.ttft_s.mean == pytest.approx(seen["ttft_s"]["mean"], rel=0.6)


def test_more_load_is_never_better(asked: Problem, plan: Plan) -> None:
    found = [predict(asked, plan, part * plan.objective.value) for part in (0.1, 0.5, 0.9, 1.0)]
    attained = [one.attainment or 0.0 for one in found]
    assert attained == sorted(attained, reverse=True)
    waits = [one.ttft_s.p90 or np.inf for one in found if one.ttft_s is not None]
    assert waits == sorted(waits)


def test_too_much_is_not_carried(asked: Problem, plan: Plan) -> None:
    said = predict(asked, plan, 3 * plan.objective.value)
    assert not said.carried
    assert said.ttft_s is None
    assert "cannot keep up" in rate_lines(plan.model_copy(update={"at_rate": said}))[0]


def test_the_plan_says_it_when_asked(asked: Problem, plan: Plan) -> None:
    found = schedule(replace(asked, rate=1.0))
    assert found.at_rate is not None
    assert found.at_rate.carried
    assert "(carried" in rate_lines(found)[0]
    assert parse_plan(found.document(), "test") == found
    assert "at_rate" not in plan.document()


def test_throughput_plans_have_no_targets_to_keep(asked: Problem) -> None:
    found = schedule(replace(asked, objective="throughput", slo=Slo(), rate=1.0))
    assert found.at_rate is not None
    assert found.at_rate.attainment is None
    assert found.at_rate.carried


def test_prompts_that_cost_nothing_beside_decoding_are_predicted_too() -> None:
    """A token more hides in the reading of weights on one GPU: nothing is left that a prompt adds."""
    task = problem(cluster((H100, 1)), load=lengths(prompt=100, answer=60), objective="goodput", rate=0.1)
    task = replace(task, cost=CostModel(task.model, settings=Settings(token_budget=256)))
    found = schedule(task, solver="colocated").at_rate
    assert found is not None
    assert found.carried
