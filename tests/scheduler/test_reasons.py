"""Why a plan is as it is: every reason is checked against a plan valued by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.scheduler.engines import PROFILES, RULES, EngineProfile
from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.scheduler.explain import with_engines_compared, with_more_gpus
from hexgen2.scheduler.layouts import StageTemplate
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.reasons import rule_costs, runners_up, stronger, template_words
from hexgen2.scheduler.restore import restored
from hexgen2.scheduler.schedule import schedule
from hexgen2.scheduler.settle import settle
from hexgen2.scheduler.solution import Cell, Solution, assess
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Plan
from tests.scheduler.support import A100, A6000, H100, L40, LARGE, cluster, clusters, lengths, problem

LOAD = lengths(count=16)
MIXED = cluster((H100, 2), (A100, 2), (A6000, 2), gbps=25)


def disaggregated(engine: str = "any", gbps: float = 25.0) -> tuple[Evaluator, Solution]:
    """The H100s prefill for the A100s and the A6000s."""
    where = cluster((H100, 2), (A100, 2), (A6000, 2), gbps=gbps)
    evaluator = Evaluator(problem(where, engine=engine, load=LOAD), best_rate)
    cells = [Cell(((0, 2),), "prefill"), Cell(((1, 2),), "decode"), Cell(((2, 2),), "decode")]
    solution = assess(evaluator, cells, coupled=True)
    assert solution is not None
    return evaluator, solution


def test_a_runner_up_is_worth_what_the_plan_with_it_is_worth() -> None:
    evaluator, solution = disaggregated()
    for cell, found in enumerate(runners_up(evaluator, solution, range(3))):
        assert found
        assert [one.value for one in found] == sorted((one.value for one in found), reverse=True)
        for one in found:
            cells = list(solution.cells)
            cells[cell] = replace(cells[cell], role=one.role, template=one.template)
            again = assess(evaluator, cells, coupled=True)
            assert again is not None
            assert one.value == pytest.approx(again.value)
            chosen = solution.options[cell]
            assert chosen is not None
            if one.role == chosen.role:
                stages = [stage.members for stage in one.template]
                assert stages != [stage.members for stage in chosen.template]
                assert one.value <= solution.value * (1 + 1e-9), "the fastest layout was not taken"


@given(clusters(most_gpus=6), st.sampled_from(["any", "vllm"]))
@settings(max_examples=8, deadline=None)
def test_in_a_finished_plan_no_other_role_of_one_group_is_better(where: Cluster, engine: str) -> None:
    """The search tries every flip, so a runner-up that wins would be a move that it left out."""
    plan = schedule(problem(where, engine=engine, load=LOAD))
    for group in plan.groups:
        for one in group.runners_up:
            assert one.loss == pytest.approx(1 - one.objective / plan.objective.value)
            assert one.loss >= -1e-9


def test_stages_in_a_row_are_said_once() -> None:
    evaluator, _ = disaggregated()
    one, two = StageTemplate(((0, 1),), 4), StageTemplate(((1, 2),), 3)
    assert template_words(evaluator.topology, (one,)) == "1×H100-80G-SXM"
    words = template_words(evaluator.topology, (one, one, two))
    assert words == "2 stages of 1×H100-80G-SXM, 4 layers each → 2×A100-80G-PCIe TP2, 3 layers"
    mixed = StageTemplate(((0, 1), (1, 1)), 5)
    assert template_words(evaluator.topology, (mixed, replace(mixed, layers=7))) == (
        "2 stages of 1×H100-80G-SXM + 1×A100-80G-PCIe TP2, 5-7 layers each"
    )


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_lifted(rule: str) -> None:
    strict = EngineProfile(
        "strict",
        uniform_tp=True,
        decode_pp=False,
        prefill_pp=False,
        tp_divides=True,
        even_stages=True,
        colocated=False,
    )
    assert strict.rules == set(RULES)
    assert strict.without(rule).rules == set(RULES) - {rule}


def test_what_is_stronger_than_an_engine() -> None:
    assert [other.name for other in stronger(PROFILES["vllm"])] == ["vllm-asymmetric"]
    assert stronger(PROFILES["vllm-asymmetric"]) == []
    assert stronger(PROFILES["any"]) == []


def two_nodes(engine: str) -> tuple[Evaluator, Solution]:
    """A decode group on two nodes, which the rules of `vllm` keep from being a pipeline."""
    evaluator = Evaluator(problem(cluster((A100, 4), (L40, 2), (L40, 2), gbps=10), LARGE, engine), best_rate)
    solution = assess(evaluator, [Cell(((0, 4),), "prefill"), Cell(((1, 2), (2, 2)), "decode")], coupled=True)
    assert solution is not None
    return evaluator, solution


def test_a_rule_costs_what_the_same_groups_serve_without_it() -> None:
    evaluator, solution = two_nodes("vllm")
    costs = {entry.rule: entry.gain for entry in rule_costs(evaluator, solution, solution.value)}
    _, free = two_nodes("any")
    without = {**vars_of(PROFILES["vllm"]), "decode_pp": True}
    lifted = Evaluator(replace(evaluator.problem, engine=EngineProfile(**without)), best_rate)
    piped = assess(lifted, [replace(cell, template=None) for cell in solution.cells], coupled=True)
    assert piped is not None
    assert costs["decode-pp"] == pytest.approx(piped.value / solution.value - 1)
    assert costs["vllm"] == pytest.approx(free.value / solution.value - 1)
    assert costs["decode-pp"] > 0.01


def vars_of(profile: EngineProfile) -> dict[str, object]:
    return {name: getattr(profile, name) for name in EngineProfile.__slots__}


def test_no_rule_costs_nothing() -> None:
    evaluator, solution = two_nodes("any")
    assert rule_costs(evaluator, solution, solution.value) == ()


@pytest.fixture(scope="module")
def asked() -> Problem:
    return problem(MIXED, engine="vllm", load=LOAD)


@pytest.fixture(scope="module")
def plan(asked: Problem) -> Plan:
    return schedule(asked)


@pytest.mark.parametrize("solver", ["hexgen2", "paper"])
def test_a_saved_plan_is_restored_to_its_own_value(solver: str, asked: Problem) -> None:
    plan = schedule(asked, solver=solver)
    _, evaluator, solution = restored(asked, plan)
    assert settle(evaluator, solution).value == pytest.approx(plan.objective.value)
    assert [option and option.rps for option in solution.options] == [
        group.capacity_rps for group in plan.groups
    ]


def test_engines_are_compared_by_planning_for_them(asked: Problem, plan: Plan) -> None:
    compared = with_engines_compared(asked, plan)
    (entry,) = [entry for entry in compared.rejected if entry.rule == "vllm"]
    other = schedule(replace(asked, engine=PROFILES["vllm-asymmetric"]))
    assert entry.gain == pytest.approx(max(other.objective.value / plan.objective.value - 1, 0), abs=1e-9)
    assert "--engine vllm-asymmetric" in entry.detail
    assert with_engines_compared(asked, compared).rejected == compared.rejected


def test_one_gpu_more_is_worth_what_the_plan_with_it_serves_more() -> None:
    asked = problem(cluster((H100, 1), (A6000, 2), gbps=25), engine="vllm", load=LOAD)
    plan = schedule(asked)
    told = with_more_gpus(asked, plan)
    prices = {price.resource: price for price in told.shadow_prices if price.kind == "gpu"}
    assert set(prices) == {H100, A6000}
    for gpu, counts in ((H100, (2, 2)), (A6000, (1, 3))):
        where = cluster((H100, counts[0]), (A6000, counts[1]), gbps=25)
        gain = schedule(problem(where, engine="vllm", load=LOAD)).objective.value - plan.objective.value
        assert prices[gpu].gain_rps >= gain - 1e-9, "the best place is at least as good as this one"
        assert prices[gpu].gain_rps > 0
    assert with_more_gpus(asked, told).shadow_prices == told.shadow_prices
