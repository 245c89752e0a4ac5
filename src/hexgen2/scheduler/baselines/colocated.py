"""Colocated serving: vLLM as people run it, and HexGen (mixed GPUs, asymmetric layouts, genetic search)."""

from __future__ import annotations

import numpy as np

from hexgen2.scheduler.baselines.ablations import STATES, evolve
from hexgen2.scheduler.columns import Kinds
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.feasible import no_plan
from hexgen2.scheduler.layouts import MAX_ORDERED
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.paper import gpu_graph, group_counts, to_members
from hexgen2.scheduler.partition import recursive, spectral_bisection
from hexgen2.scheduler.problem import Budget, Problem
from hexgen2.scheduler.solution import Cell, Solution, assess
from hexgen2.scheduler.topology import Members, members_of


def colocated(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """One replica size per kind of node, the best for that kind; no replica mixes kinds.

    A replica takes some GPUs of one node, or, where a node is too small, whole nodes of the kind.
    """
    del problem, seed, budget
    kinds = Kinds(evaluator.topology)
    cells: list[Cell] = []
    for kind in range(len(kinds.nodes)):
        choices = [_inside(kinds, kind, gpus) for gpus in range(1, kinds.count(kind) + 1)]
        most = min(MAX_ORDERED + 1, len(kinds.nodes[kind]))
        choices += [_across(kinds, kind, nodes) for nodes in range(2, most + 1)]
        rated = [(_total(evaluator, groups), place) for place, groups in enumerate(choices)]
        rate, place = max(rated, key=lambda pair: (pair[0], -pair[1]))
        if rate > 0:
            cells += [Cell(members, "colocated") for members in choices[place]]
    solution = assess(evaluator, cells)
    assert solution is not None, "no lower limit was given"
    if solution.value <= 0:
        raise no_plan(evaluator)
    return solution


def hexgen(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """HexGen: colocated groups of any GPUs, found by a genetic search from spectral partitions."""
    if budget.limit_s is None:
        budget.states = STATES
    rng = np.random.default_rng(seed)
    weights, memory = gpu_graph(problem)
    first: list[Cells] = []
    for count in [1, *group_counts(evaluator)]:
        groups = recursive(count, np.arange(len(memory)), spectral_bisection(weights, memory))
        first.append(tuple(Cell(to_members(evaluator, group), "colocated") for group in groups))
    best = evolve(evaluator, first, rng, budget, roles=("colocated",))
    if best.value <= 0:
        raise no_plan(evaluator)
    return best


def _inside(kinds: Kinds, kind: int, gpus: int) -> list[Members]:
    """As many groups of ``gpus`` GPUs as each node of the kind holds."""
    return [((node, gpus),) for node in kinds.nodes[kind] for _ in range(kinds.count(kind) // gpus)]


def _across(kinds: Kinds, kind: int, nodes: int) -> list[Members]:
    """Groups of that many whole nodes of the kind, neighbours in the canonical order."""
    mine = kinds.nodes[kind]
    count = kinds.count(kind)
    return [
        members_of(dict.fromkeys(mine[at : at + nodes], count)) for at in range(0, len(mine) - nodes + 1, nodes)
    ]


def _total(evaluator: Evaluator, groups: list[Members]) -> float:
    found = [evaluator.choose(members, "colocated") for members in groups]
    return sum(option.rps for option in found if option is not None)
