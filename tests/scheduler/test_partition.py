"""The first and the secondary partition."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.scheduler import schedule
from hexgen2.scheduler.metis import metis_groups
from hexgen2.scheduler.paper import gpu_graph
from hexgen2.scheduler.partition import fiedler, kernighan_lin, recursive, spectral_bisection
from hexgen2.scheduler.roles import coarsen, split, weaker_phase
from hexgen2.specs.errors import InputError
from tests.scheduler.checks import check_plan
from tests.scheduler.support import A100, H100, L40, cluster, problem


def blocks(count: int, each: int) -> np.ndarray:
    """A graph of ``count`` cliques of weight 100, joined by weight 1."""
    weights = np.ones((count * each, count * each))
    for block in range(count):
        weights[block * each : (block + 1) * each, block * each : (block + 1) * each] = 100.0
    np.fill_diagonal(weights, 0.0)
    return weights


def labels(groups: list[np.ndarray]) -> set[frozenset[int]]:
    return {frozenset(int(vertex) for vertex in group) for group in groups}


@pytest.mark.parametrize(("count", "each"), [(2, 4), (3, 4), (4, 2), (5, 3)])
def test_spectral_partition_finds_cliques(count: int, each: int) -> None:
    weights = blocks(count, each)
    memory = np.ones(len(weights))
    groups = recursive(count, np.arange(len(weights)), spectral_bisection(weights, memory))
    groups = kernighan_lin(groups, weights, lambda _: True)
    assert labels(groups) == {frozenset(range(b * each, (b + 1) * each)) for b in range(count)}


@pytest.mark.parametrize(("count", "each"), [(2, 4), (3, 4), (4, 2), (5, 3)])
def test_metis_finds_cliques_and_repeats_itself(count: int, each: int) -> None:
    pytest.importorskip("pymetis")
    weights = blocks(count, each)
    memory = np.ones(len(weights))
    groups = metis_groups(count, weights, memory)
    assert labels(groups) == {frozenset(range(b * each, (b + 1) * each)) for b in range(count)}
    assert labels(metis_groups(count, weights, memory)) == labels(groups)


def test_metis_leaves_a_single_gpu_as_it_is() -> None:
    assert [group.tolist() for group in metis_groups(2, np.zeros((1, 1)), np.ones(1))] == [[0]]


@pytest.mark.parametrize("solver", ["paper", "hexgen2"])
def test_plans_from_metis_are_valid(solver: str) -> None:
    pytest.importorskip("pymetis")
    task = problem(cluster((H100, 2), (A100, 4), (L40, 3), gbps=10, links={(0, 1): 50}), init="metis")
    plan = schedule(task, solver=solver)
    check_plan(plan, task.model, task.lengths)
    assert plan.objective.value == schedule(task, solver=solver).objective.value


def test_metis_that_is_missing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hexgen2.scheduler.metis.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"--init.*pymetis, which is not installed; pip install"):
        schedule(problem(cluster((H100, 2)), init="metis"), solver="paper")


def test_fiedler_vector_is_the_second_eigenvector() -> None:
    weights = blocks(2, 3)
    vector = fiedler(weights)
    degrees = weights.sum(axis=1)
    laplacian = np.diag(degrees) - weights
    quotient = (vector @ laplacian @ vector) / (vector @ (degrees * vector))
    scaled = laplacian / np.sqrt(np.outer(degrees, degrees))
    assert quotient == pytest.approx(np.linalg.eigvalsh(scaled)[1])


@given(
    st.integers(1, 6), st.lists(st.sampled_from([40.0, 48.0, 80.0]), min_size=6, max_size=16), st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_partition_covers_and_balances_memory(count: int, memory: list[float], seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(1, 100, size=(len(memory), len(memory)))
    weights = weights + weights.T
    np.fill_diagonal(weights, 0)
    sizes = np.array(memory)
    groups = recursive(count, np.arange(len(memory)), spectral_bisection(weights, sizes))
    assert len(groups) == count
    assert sorted(int(v) for group in groups for v in group) == list(range(len(memory)))
    assert all(len(group) for group in groups)
    # Each of the log2(count) cuts is off by at most half a vertex, halves inherit it in proportion.
    ideal = sizes.sum() / count
    assert max(sizes[group].sum() for group in groups) <= ideal + 2 * sizes.max()


@given(st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_swaps_raise_the_weight_inside_and_keep_the_condition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0, 10, size=(12, 12))
    weights = weights + weights.T
    np.fill_diagonal(weights, 0)
    memory = rng.choice([1.0, 2.0], size=12)
    groups = [np.arange(0, 4), np.arange(4, 8), np.arange(8, 12)]

    def inside(parts: list[np.ndarray]) -> float:
        return float(sum(weights[np.ix_(part, part)].sum() for part in parts))

    def may(vertices: np.ndarray) -> bool:
        return bool(memory[vertices].sum() >= 5)

    after = kernighan_lin(groups, weights, may)
    assert inside(after) >= inside(groups)
    assert [len(part) for part in after] == [4, 4, 4]
    for before, now in zip(groups, after, strict=True):
        assert may(now) or not may(before)


def test_the_gpu_graph_has_bandwidths_and_memory() -> None:
    weights, memory = gpu_graph(problem(cluster((H100, 2), (L40, 1), gbps=8)))
    assert weights[0, 1] == pytest.approx(450, rel=0.01)
    assert weights[0, 2] == pytest.approx(1.0)
    assert np.all(np.diag(weights) == 0)
    assert memory[0] > memory[2]


@given(st.integers(2, 7), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_secondary_partition_balances_and_then_crosses(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prefill, decode = rng.uniform(1, 5, count), rng.uniform(1, 5, count)
    weights = rng.uniform(0, 1, (count, count))
    between = np.triu(weights, 1) + np.triu(weights, 1).T
    chosen = split(prefill, decode, between)
    every = np.array(list(product((False, True), repeat=count)))
    best = weaker_phase(every, prefill, decode).max()
    assert weaker_phase(chosen, prefill, decode) >= 0.95 * best
    near = every[weaker_phase(every, prefill, decode) >= 0.95 * best].astype(float)
    crossing = np.einsum("si,ij,sj->s", near, between, 1 - near)
    row = chosen.astype(float)
    assert row @ between @ (1 - row) == pytest.approx(crossing.max())


def test_many_groups_are_split_without_looking_at_every_split() -> None:
    rng = np.random.default_rng(3)
    prefill, decode = rng.uniform(1, 5, 40), rng.uniform(1, 5, 40)
    between = np.ones((40, 40)) - np.eye(40)
    chosen = split(prefill, decode, between)
    # No split beats giving each phase its share of the sum of every group's better half.
    assert weaker_phase(chosen, prefill, decode) >= 0.9 * 0.5 * np.maximum(prefill, decode).sum()


def test_coarsening_sums_edges() -> None:
    weights, _ = gpu_graph(problem(cluster((H100, 2), (A100, 2), gbps=8)))
    between = coarsen(weights, [np.array([0, 1]), np.array([2, 3])])
    assert between[0, 1] == pytest.approx(4.0)
    assert between[0, 0] == 0
