"""Moves keep every GPU, and climbing never lowers the flow."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from hexgen2.scheduler import moves
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.paper import starts
from hexgen2.scheduler.problem import Budget
from hexgen2.scheduler.refine import climb
from hexgen2.scheduler.solution import Cell, assess, better
from hexgen2.specs.cluster import Cluster
from tests.scheduler.support import A100, H100, L40, cluster, clusters, problem


def gpus(cells: tuple[Cell, ...]) -> Counter[int]:
    total: Counter[int] = Counter()
    for cell in cells:
        assert cell.members, "a move left an empty group"
        assert all(count > 0 for _, count in cell.members)
        total.update(dict(cell.members))
    return total


def test_guided_moves_use_only_gpus_that_are_there() -> None:
    task = problem(cluster((H100, 2), (A100, 4), (L40, 4), gbps=5))
    evaluator = Evaluator(task)
    whole = Counter(dict(evaluator.topology.everything))
    start = next(starts(task, evaluator, np.random.default_rng(0)))
    found = list(moves.guided(start))
    assert len(found) > 20
    for cells in found:
        assert gpus(cells) <= whole
        assert gpus(cells) >= gpus(start.cells)


def test_guided_moves_begin_with_the_bottleneck() -> None:
    task = problem(cluster((H100, 4), (L40, 2), gbps=100))
    evaluator = Evaluator(task)
    cells = (Cell(((0, 1),), "prefill"), Cell(((0, 3),), "decode"), Cell(((1, 2),), "decode"))
    solution = assess(evaluator, cells)
    assert solution is not None
    groups, _ = moves.bottlenecks(solution)
    assert [cells[group].role for group in groups] == ["prefill"]
    first = next(iter(moves.guided(solution)))
    assert sum(cell.role == "prefill" for cell in first) == 2


def test_idle_gpus_are_offered() -> None:
    evaluator = Evaluator(problem(cluster((H100, 4), gbps=100)))
    solution = assess(evaluator, (Cell(((0, 1),), "prefill"), Cell(((0, 2),), "decode")))
    assert solution is not None
    assert solution.idle == ((0, 1),)
    assert any(sum(gpus(cells).values()) == 4 for cells in moves.guided(solution))


@given(clusters(most_gpus=7))
@settings(max_examples=15, deadline=None)
def test_climbing_never_lowers_the_flow(where: Cluster) -> None:
    task = problem(where)
    evaluator = Evaluator(task)
    if len(where.gpus) < 2:
        return
    for start in list(starts(task, evaluator, np.random.default_rng(1)))[:3]:
        seen: list[float] = []
        budget = Budget(lambda: 0.0, progress=lambda step, seen=seen: seen.append(step.value))
        found = climb(evaluator, start, moves.guided, budget, set())
        assert not better(start, found)
        assert seen == sorted(seen)


def test_a_state_below_the_limit_is_not_solved() -> None:
    evaluator = Evaluator(problem(cluster((H100, 4), gbps=100)))
    cells = (Cell(((0, 1),), "prefill"), Cell(((0, 3),), "decode"))
    solution = assess(evaluator, cells)
    assert solution is not None
    assert assess(evaluator, cells, solution.flow.network.ceiling * 1.01) is None
    again = assess(evaluator, cells, solution.value)
    assert again is not None
    assert again.value == pytest.approx(solution.value)
