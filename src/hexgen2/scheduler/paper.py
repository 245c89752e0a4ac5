"""The paper's scheduler (HexGen-2, section 3): partition, roles, layouts, max-flow, guided refinement.

Exactly that: K near total memory / a replica's need and its neighbours, the paper's layout rule, one capacity
per KV edge, swaps guided by the residual network, no colocated groups. It is the reference for `hexgen2`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler import moves
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.feasible import need_bytes, no_disaggregation
from hexgen2.scheduler.metis import metis_groups
from hexgen2.scheduler.partition import kernighan_lin, recursive, spectral_bisection
from hexgen2.scheduler.problem import Budget, Problem
from hexgen2.scheduler.refine import MoveSource, climb
from hexgen2.scheduler.roles import coarsen, split
from hexgen2.scheduler.solution import Cell, Solution, assess, better
from hexgen2.scheduler.topology import Members, members_of

SEEDS_PER_COUNT = 2
NOISE = 0.02
"""Relative noise on edge weights in all starts but the first of each K: it breaks ties differently."""


def search(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """The best plan of all starts; raises InputError when no two replicas fit."""
    return best_of_starts(
        evaluator, starts(problem, evaluator, np.random.default_rng(seed)), moves.guided, budget
    )


def best_of_starts(
    evaluator: Evaluator, begin: Iterator[Solution], source: MoveSource, budget: Budget
) -> Solution:
    """Climb from every start; the best end. The first start is finished whatever the time limit says."""
    best: Solution | None = None
    seen: set[frozenset[Cell]] = set()
    for start in begin:
        found = climb(evaluator, start, source, budget, seen)
        if best is None or better(found, best):
            best = found
            budget.report("start", best.value)
        if budget.over and best.value > 0:
            break
    if best is None or best.value <= 0:
        raise no_disaggregation(evaluator)
    return best


def starts(problem: Problem, evaluator: Evaluator, rng: np.random.Generator) -> Iterator[Solution]:
    """First solutions: partition, Kernighan–Lin, secondary partition, for each K and some seeds."""
    bandwidth, memory = gpu_graph(problem)
    for attempt in range(SEEDS_PER_COUNT):
        for count in group_counts(evaluator):
            weights = bandwidth
            if attempt:
                noise = rng.uniform(1 - NOISE, 1 + NOISE, size=weights.shape)
                weights = weights * np.sqrt(noise * noise.T)
            groups = first_groups(problem, count, weights, memory)
            yield start_from(evaluator, groups, weights, memory)


def first_groups(
    problem: Problem, count: int, weights: NDArray[np.float64], memory: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """The first partition into ``count`` groups (METIS may make fewer)."""
    if problem.init == "metis":
        return metis_groups(count, weights, memory)
    return recursive(count, np.arange(len(memory)), spectral_bisection(weights, memory))


def start_from(
    evaluator: Evaluator,
    groups: list[NDArray[np.int64]],
    weights: NDArray[np.float64],
    memory: NDArray[np.float64],
) -> Solution:
    """A solution from a first partition of the GPUs: improved by swaps, then split into the two types."""
    usable = evaluator.problem.cost.settings.memory_utilisation * memory
    need = need_bytes(evaluator.problem)
    groups = kernighan_lin(groups, weights, lambda vertices: usable[vertices].sum() >= need)
    members = [to_members(evaluator, vertices) for vertices in groups]
    capacity = np.array(
        [
            [option.rps if (option := evaluator.choose(part, role)) else 0.0 for part in members]
            for role in ("prefill", "decode")
        ]
    )
    prefills = split(capacity[0], capacity[1], coarsen(weights, groups))
    cells = [
        Cell(part, "prefill" if first else "decode") for part, first in zip(members, prefills, strict=True)
    ]
    solution = assess(evaluator, cells)
    assert solution is not None, "no lower limit was given"
    return solution


def to_members(evaluator: Evaluator, vertices: NDArray[np.int64]) -> Members:
    """GPU indices as counts by node."""
    gpus = evaluator.problem.cluster.gpus
    counts: dict[int, int] = {}
    for vertex in vertices:
        node = gpus[int(vertex)].node
        counts[node] = counts.get(node, 0) + 1
    return members_of(counts)


def gpu_graph(problem: Problem) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(edge weights = bandwidth (G, G) in GB/s with a zero diagonal, vertex weights = memory (G,) in bytes)."""
    weights = problem.cluster.bandwidth / 1e9
    np.fill_diagonal(weights, 0.0)
    return weights, np.array([gpu.type.memory_bytes for gpu in problem.cluster.gpus])


def group_counts(evaluator: Evaluator) -> list[int]:
    """K = total memory / a replica's need, and neighbours of it: below, since groups cannot be cut finer."""
    problem = evaluator.problem
    total = evaluator.topology.memory_of(evaluator.topology.everything)
    usable = total * problem.cost.settings.memory_utilisation
    gpus = len(problem.cluster.gpus)
    most = max(2, min(gpus, int(usable // need_bytes(problem))))
    wanted = [most, most - 1, most - 2, round(0.75 * most), round(0.5 * most), round(0.35 * most)]
    return list(dict.fromkeys(max(2, min(gpus, count)) for count in wanted))
