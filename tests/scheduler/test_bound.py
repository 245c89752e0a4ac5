"""The upper bound: never below the exhaustive solver, part by part and as a whole."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from hexgen2.cost.memory import Settings
from hexgen2.cost.replica import CostModel
from hexgen2.cost.stage import StageCost
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.scheduler.bound import additive, upper_bound
from hexgen2.scheduler.bound.exchange import Exchange
from hexgen2.scheduler.bound.grid import grid_bound
from hexgen2.scheduler.bound.groups import GroupTable
from hexgen2.scheduler.bound.linear import linear_bound
from hexgen2.scheduler.bound.packing import NEGLIGIBLE, closure, parts
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.rates import GroupRates
from hexgen2.scheduler.bound.stages import Stages
from hexgen2.scheduler.bound.times import Iteration, many_seconds
from hexgen2.scheduler.bound.work import RoleWork
from hexgen2.scheduler.columns import Kinds
from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.scheduler.exhaustive import _choices
from hexgen2.scheduler.problem import Budget
from hexgen2.scheduler.topology import Topology
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import Cluster, load_cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.model import Model
from hexgen2.specs.plan import ROLES, Role, Slo
from hexgen2.specs.workload import Lengths
from tests.scheduler.support import (
    A100,
    A6000,
    H100,
    L40,
    LATENT,
    MIXTURE,
    SMALL,
    cluster,
    clusters,
    lengths,
    problem,
)
from tests.scheduler.test_hexgen2 import random_problem

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"
FEW_LAYERS = Model.model_validate(
    {**SMALL.model_dump(), "name": "six-layers", "layers": 6, "weight_bytes": 12.0}
)
ROUNDING = 1e-6
UNLIMITED = Budget(lambda: 0.0)


def vectors(where: Cluster) -> list[tuple[int, ...]]:
    """Every group of a cluster, as GPUs by node."""
    return [found for found in product(*(range(node.count + 1) for node in where.nodes)) if any(found)]


def bounds(task: Problem) -> dict[str, float]:
    """The bound in each of its ways that knows the task's engine."""
    topology = Topology(task.cluster)
    found = {
        "grid": grid_bound(task, topology).value,
        "additive": additive.additive_bound(Evaluator(task, best_rate)),
    }
    if task.engine.uniform_tp:
        value = linear_bound(task, Places.of_kinds(Kinds(topology)))
        assert value is not None
        found["linear"] = value
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_times_on_arrays_are_those_of_the_cost_model(data: st.DataObject) -> None:
    figures = {}
    for field in fields(StageCost):
        if field.type == "int":
            figures[field.name] = data.draw(st.integers(0, 8), label=field.name)
        else:
            figures[field.name] = data.draw(st.just(0.0) | st.floats(1e-9, 1e-3), label=field.name)
    figures |= {"small_tokens": 50.0, "expert_miss_log": -0.3}
    cost = StageCost(**figures)
    rows = data.draw(st.lists(st.tuples(*[st.integers(0, 300).map(float)] * 4), min_size=1, max_size=5))
    work = Iteration(2.0, *(np.array(column) for column in zip(*rows, strict=True)))
    expected = [2.0 * cost.seconds(*row) for row in rows]
    assert many_seconds(cost, work) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("objective", ["throughput", "goodput"])
@pytest.mark.parametrize("engine", ["vllm", "any"])
@pytest.mark.parametrize("model", [FEW_LAYERS, MIXTURE, LATENT], ids=lambda model: model.name)
def test_no_layout_of_a_group_is_faster_than_its_bound(model: Model, engine: str, objective: str) -> None:
    where = cluster((H100, 1), (A100, 2), (L40, 1), gbps=10, links={(0, 1): 100, (1, 2): 25})
    small = Model.model_validate({**model.model_dump(), "layers": 6})
    more = {"objective": objective, "slo": Slo(tpot_s=0.02)}
    for load in (lengths(1500, 100), lengths(200, 300)):
        task = problem(where, small, engine, load, **more)
        places = Places.of_nodes(Topology(task.cluster))
        checked = 0
        for role in ROLES:
            table = GroupTable(task, places, role)
            for vector in vectors(where):
                best = max((choice.rps for choice in _choices(task, vector, role, UNLIMITED)), default=0.0)
                cell = np.array([vector])
                close = float(table.exact(cell, np.zeros(1))[0])
                assert best <= close * (1 + ROUNDING)
                assert close <= float(table.guesses[vector]) * (1 + ROUNDING)
                checked += best > 0
        assert checked >= 6


@settings(max_examples=25, deadline=None)
@given(clusters(most_gpus=5), st.sampled_from(ROLES), st.integers(0, 3))
def test_no_layout_of_any_group_is_faster_on_random_clusters(where: Cluster, role: Role, load: int) -> None:
    task = problem(
        where, FEW_LAYERS, "vllm", lengths(*((1500, 100), (300, 300), (1000, 200), (2000, 30))[load])
    )
    places = Places.of_nodes(Topology(where))
    table = GroupTable(task, places, role)
    for vector in vectors(where):
        best = max((choice.rps for choice in _choices(task, vector, role, UNLIMITED)), default=0.0)
        assert best <= float(table.exact(np.array([vector]), np.zeros(1))[0]) * (1 + ROUNDING)


def exhaustive_against_bounds(seed: int, most: int) -> dict[str, float] | None:
    """Each bound over the optimum, which none may be below; None where nothing fits."""
    task = random_problem(seed, most)
    if seed % 3 == 0:
        task = replace(task, objective="goodput", slo=Slo(tpot_s=0.05))
    try:
        best = schedule(task, solver="exhaustive").objective.value
    except InputError:
        return None
    found = {name: value / best for name, value in bounds(task).items()}
    assert min(found.values()) >= 1 - ROUNDING, f"a bound is below the optimum: {found}"
    return found


def test_never_below_the_exhaustive_optimum() -> None:
    found = {seed: ratios for seed in range(40, 64) if (ratios := exhaustive_against_bounds(seed, 4))}
    assert len(found) >= 12
    # Under goodput (every third seed) the bound is wide: it knows nothing of queues.
    assert np.median([ratios["grid"] for seed, ratios in found.items() if seed % 3]) <= 1.05


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_never_below_the_exhaustive_optimum_on_many_clusters() -> None:
    found = [ratios for seed in range(2000, 2120) if (ratios := exhaustive_against_bounds(seed, 7))]
    assert len(found) >= 60


def example(name: str, model: str, workload: str, engine: str = "vllm") -> Problem:
    return Problem(
        cluster=load_cluster(EXAMPLES / f"{name}.yaml"),
        workload=workload,
        lengths=load_workload(workload).representative(256),
        cost=CostModel(load_model(model)),
        engine=PROFILES[engine],
    )


@pytest.mark.parametrize("solver", ["colocated", "distserve", "paper"])
def test_no_plan_of_another_solver_is_above(solver: str) -> None:
    task = example("mixed-5", "llama-2-70b", "lphd")
    plan = schedule(task, solver=solver, time_limit_s=3)
    assert plan.upper_bound is not None
    assert 0 < plan.objective.value <= min(plan.upper_bound, *bounds(task).values()) * (1 + ROUNDING)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["homogeneous-8xh100", "mixed-1", "mixed-2", "mixed-3", "mixed-4", "large-64"])
def test_no_plan_of_any_solver_is_above(name: str) -> None:
    solvers = ("hexgen2", "paper", "colocated", "distserve", "hexgen", "genetic", "random-swap")
    for model, workload in product(("llama-2-70b", "opt-30b"), ("hpld", "hphd", "lphd", "lpld")):
        task = example(name, model, workload)
        value = upper_bound(Evaluator(task, best_rate)).value
        for solver in solvers:
            assert schedule(task, solver=solver, time_limit_s=2).objective.value <= value * (1 + ROUNDING)


@pytest.mark.parametrize("model", ["llama-2-70b", "opt-30b"])
@pytest.mark.parametrize("workload", ["hpld", "hphd", "lphd", "lpld"])
def test_one_node_of_h100_is_planned_within_one_percent(model: str, workload: str) -> None:
    plan = schedule(example("homogeneous-8xh100", model, workload))
    assert plan.gap is not None
    assert plan.gap <= 0.01


@settings(max_examples=15, deadline=None)
@given(clusters(most_gpus=5), st.integers(0, 2), st.sampled_from(["vllm", "any"]))
def test_one_more_gpu_never_lowers_the_bound(where: Cluster, node: int, engine: str) -> None:
    document = where.document()
    counted = document["nodes"][node % len(document["nodes"])]
    counted["count"] += 1
    larger = Cluster.model_validate({**document, "inline_types": ()})
    less, more = (bounds(problem(each, FEW_LAYERS, engine)) for each in (where, larger))
    for name, value in less.items():
        assert more[name] >= value * (1 - NEGLIGIBLE - ROUNDING), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=12, max_size=12))
def test_the_closure_is_the_best_packing(values: list[int]) -> None:
    table = np.array([0.0, *values[:11]]).reshape(3, 4)
    best, groups = closure(table, lambda cells, _: table[tuple(cells.T)])
    expected = np.zeros_like(table)
    for cell in product(range(3), range(4)):
        options = [0.0]
        for part in product(range(cell[0] + 1), range(cell[1] + 1)):
            if any(part):
                options.append(table[part] + expected[cell[0] - part[0], cell[1] - part[1]])
        expected[cell] = max(options)
    assert np.all(best <= expected * (1 + ROUNDING))
    assert np.all(best * (1 + NEGLIGIBLE) >= expected * (1 - ROUNDING))
    whole = parts(best, groups, np.array([2, 3]))
    assert sum(table[tuple(part)] for part in whole) == pytest.approx(best[2, 3])
    assert np.all(np.sum([[0, 0], *whole], axis=0) <= [2, 3])


@settings(max_examples=40, deadline=None)
@given(clusters(most_gpus=6), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_cuts_allow_every_flow(where: Cluster, counts: list[int]) -> None:
    exchange = Exchange(problem(where), Places.of_nodes(Topology(where)))
    nodes = len(where.nodes)
    giving, taking = np.array(counts[:nodes]), np.array(counts[3 : 3 + nodes])
    # max Σ flow from node to node within what GPUs contribute, links and NICs; inside a node without limit.
    pairs = list(product(range(nodes), range(nodes)))
    rows, limits = [], []
    for node in range(nodes):
        rows += [[float(a == node) for a, _ in pairs], [float(b == node) for _, b in pairs]]
        limits += [giving[node] * exchange.prefill_gpu[node], taking[node] * exchange.decode_gpu[node]]
    most = [(0, None if a == b else exchange.link[a, b]) for a, b in pairs]
    solved = linprog(-np.ones(len(pairs)), A_ub=np.array(rows), b_ub=limits, bounds=most, method="highs")
    found = float(exchange.most(giving[None], taking[None])[0])
    assert found == pytest.approx(-solved.fun, rel=1e-6, abs=1e-9)


def test_a_cluster_of_many_kinds_has_a_bound_too() -> None:
    where = cluster((H100, 4), (A100, 4), (L40, 4), (A6000, 4), (H100, 8), (A100, 8), (L40, 8), (A6000, 8))
    for engine in ("vllm", "any"):
        task = problem(where, SMALL, engine)
        plan = schedule(task, solver="colocated")
        assert plan.upper_bound is not None
        assert plan.objective.value <= plan.upper_bound


def fixed(prompt: int, answer: int) -> Lengths:
    return Lengths(np.array([prompt]), np.array([answer]))


WIDE_CACHE = SMALL.model_copy(update={"name": "wide-cache", "weight_bytes": 10.0, "kv_bytes": 64.0})
ODD = {
    "a prompt beyond the token budget": (WIDE_CACHE, fixed(9000, 2), Settings(token_budget=256)),
    "a prompt cut smaller than the token budget": (WIDE_CACHE, fixed(8200, 50), Settings()),
}


@pytest.mark.parametrize("latency_ms", [0.0, 50.0])
@pytest.mark.parametrize("name", ODD)
def test_no_group_of_an_odd_load_is_faster_than_any_bound(name: str, latency_ms: float) -> None:
    model, load, how = ODD[name]
    network = {"default": {"gbps": 10, "latency_ms": latency_ms}}
    where = cluster((A100, 1), (A100, 1), (A100, 1), network=network)
    for engine in ("vllm", "any"):
        task = replace(problem(where, model, engine, load), cost=CostModel(model, settings=how))
        places = Places.of_nodes(Topology(where))
        served = 0.0
        for role in ROLES:
            table = GroupTable(task, places, role)
            for vector in vectors(where):
                best = max((choice.rps for choice in _choices(task, vector, role, UNLIMITED)), default=0.0)
                assert best <= float(table.exact(np.array([vector]), np.zeros(1))[0]) * (1 + ROUNDING)
                served = max(served, best if role == "colocated" else 0.0)
        assert 0 < served <= min(bounds(task).values()) * (1 + ROUNDING)


def test_links_slower_than_all_layers_leave_pipelines_a_bound() -> None:
    """Being reached may take longer than all else, counted in layers of one stage more than of another."""
    changed = {"layers": 32, "heads": 8, "intermediate_size": 4096, "weight_bytes": 4.0}
    network = {"default": {"gbps": 25, "latency_ms": 50}}
    task = problem(
        cluster((H100, 5), (L40, 1), network=network), SMALL.model_copy(update=changed), load=fixed(13, 4)
    )
    places = Places.of_nodes(Topology(task.cluster))
    for role in ROLES:
        rates = GroupRates(task, places, role)
        for counts in ([4, 0, 0, 1], [0, 2, 0, 1], [1, 0, 1, 1], [2, 1, 0, 0]):
            stages = Stages(places, ((0, 1), (0, 2), (0, 4), (1, 1)), np.array([counts]))
            quick, batches = rates.quick(stages)
            assert 0 < rates.close(stages, batches, np.zeros(1))[0] <= quick[0] * (1 + ROUNDING)


@pytest.mark.parametrize("batch", [4, 16, 256])
def test_a_layer_takes_no_less_than_the_bound_counts_where_few_iterations_carry_prompts(batch: int) -> None:
    """Prompts touch all experts at once, which the mean number of tokens does not show."""
    stages, each = np.array([4.0]), batch / 4
    task = problem(cluster((A100, 4)), MIXTURE, load=fixed(2000, 100))
    evaluator = Evaluator(task, best_rate)
    work = RoleWork(task, "colocated")
    iterations = work.iterations(stages.astype(int), np.array([batch]))
    layer = additive.layer_of(evaluator, Kinds(evaluator.topology), 0, 1)
    real = [
        sum(float(np.sum(many_seconds(cost, iteration))) for iteration in iterations) - layer.steps
        for cost in layer.costs
    ]
    tokens, squares = each * (1 + 2000 / 100), each * 2000**2 / 100
    counted = layer.mean_seconds(each, tokens, squares, each * task.cost.moments(task.lengths).context)
    assert 0.3 * min(real) <= counted <= min(real) * (1 + ROUNDING)

    times = GroupRates(task, Places.of_nodes(evaluator.topology), "colocated").times((0, 1))
    most = work.iterations((stages * 256 / batch).astype(int), np.array([256]))
    counted = float(times.layer_of_any_batch(most, replace(most[-1], weight=1.0))[0])
    assert counted <= float(times.layer(iterations)[0]) * (1 + ROUNDING)
