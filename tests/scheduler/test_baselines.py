"""The baselines: valid plans that keep to what each system can do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.scheduler import Problem, schedule
from hexgen2.scheduler.baselines.ablations import crossed
from hexgen2.scheduler.solution import Cell
from hexgen2.specs.plan import Plan
from tests.scheduler.checks import check_plan
from tests.scheduler.support import A100, H100, L40, SMALL, cluster, lengths, problem

ABLATIONS = ("genetic", "random-swap")


def task() -> Problem:
    return problem(cluster((H100, 2), (A100, 4), (L40, 2), gbps=25), engine="vllm", load=lengths(1200, 200))


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    names = ("hexgen2", "paper", "distserve", "distserve-pairs", "hexgen", "colocated", *ABLATIONS)
    return {name: schedule(task(), solver=name) for name in names}


def test_every_baseline_gives_a_valid_plan(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        check_plan(plan, SMALL, task().lengths)


@pytest.mark.parametrize("name", ["distserve", "distserve-pairs"])
def test_distserve_joins_like_gpus_only_and_has_one_parallelism_a_phase(
    plans: dict[str, Plan], name: str
) -> None:
    plan = plans[name]
    kinds = {group.id: {plan.cluster.gpu_by_id[gpu].type.name for gpu in group.gpus} for group in plan.groups}
    assert all(len(found) == 1 for found in kinds.values())
    for route in plan.routes:
        assert kinds[route.source] == kinds[route.target]
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for group in plan.groups:
        (kind,) = kinds[group.id]
        shapes.setdefault((group.role, kind), set()).add(tuple(stage.tp for stage in group.stages))
    assert all(len(found) == 1 for found in shapes.values())


def test_pairs_are_as_many_of_both_phases_and_no_better(plans: dict[str, Plan]) -> None:
    plan = plans["distserve-pairs"]
    assert len(plan.role_groups("prefill")) == len(plan.role_groups("decode"))
    assert plan.objective.value <= plans["distserve"].objective.value * (1 + 1e-9)


def test_colocated_baselines_have_no_routes(plans: dict[str, Plan]) -> None:
    for name in ("colocated", "hexgen"):
        assert {group.role for group in plans[name].groups} == {"colocated"}
        assert plans[name].routes == ()


def test_ablations_disaggregate(plans: dict[str, Plan]) -> None:
    for name in ("genetic", "random-swap", "paper"):
        assert {group.role for group in plans[name].groups} == {"prefill", "decode"}


def test_the_default_solver_is_the_best(plans: dict[str, Plan]) -> None:
    best = plans["hexgen2"].objective.value
    assert all(best >= plan.objective.value * (1 - 1e-6) for plan in plans.values())


@pytest.mark.parametrize("name", ["genetic", "random-swap", "hexgen"])
def test_random_solvers_repeat_with_the_seed(name: str) -> None:
    first, second = (schedule(task(), solver=name, seed=5).document() for _ in range(2))
    first["wall_s"] = second["wall_s"] = 0
    assert first == second


@given(st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_a_child_has_every_gpu_once(seed: int) -> None:
    first = (Cell(((0, 2), (1, 1)), "prefill"), Cell(((1, 3),), "decode"))
    second = (Cell(((0, 1),), "decode"), Cell(((0, 1), (1, 4)), "prefill"))
    child = crossed(first, second, ((0, 2), (1, 4)), np.random.default_rng(seed))
    counts: dict[int, int] = {}
    for cell in child:
        for node, count in cell.members:
            counts[node] = counts.get(node, 0) + count
    assert counts == {0: 2, 1: 4}
