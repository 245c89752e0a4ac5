"""First plans for the default solver: from the master program, from the paper's partitions, all colocated.

The master program says how many groups of each template serve most. Where nodes are few each is a kind of its
own, so its answer is a plan. In larger clusters nodes of a type are one kind and the answer has to be put on
real nodes; and each community of well-joined nodes (a rack, a zone) is solved by itself, node by node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler import paper
from hexgen2.scheduler.columns import FINE_NODES, Column, Kinds, columns
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.master import best_counts, counted_value, program
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.solution import Cell
from hexgen2.scheduler.topology import size

KEEP = 24
"""Templates of either sort among which the master program looks for whole numbers, where groups exchange."""
KEEP_EACH = 12
"""The same for each of many communities: on 320 GPUs a third of the time for at most 0.7% less."""


def master_starts(problem: Problem, evaluator: Evaluator) -> Iterator[Cells]:
    """Colocated groups alone, all roles where the program sees more in them, disaggregated groups alone."""
    topology = evaluator.topology
    by_node = Kinds(topology, labels=tuple(range(len(topology.counts))))
    if len(topology.counts) <= FINE_NODES:
        yield from _solved(problem, by_node, columns(evaluator, by_node))
        return
    kinds = Kinds(topology)
    found = columns(evaluator, kinds)
    yield from _solved(problem, kinds, found)
    yield from _solved(problem, kinds, [column for column in found if column.role != "colocated"])
    if np.bincount(topology.community).max() <= FINE_NODES:
        yield from community_starts(problem, evaluator, by_node)


def community_starts(problem: Problem, evaluator: Evaluator, by_node: Kinds) -> Iterator[Cells]:
    """Every community by itself: colocated groups alone, and the best of that and all roles."""
    communities: list[list[Column]] = [[] for _ in range(int(evaluator.topology.community.max()) + 1)]
    for column in columns(evaluator, by_node):
        communities[by_node.community[column.parts[0][0]]].append(column)
    alone: list[Cell] = []
    best: list[Cell] = []
    for mine in communities:
        solved = list(_solved(problem, by_node, mine, KEEP_EACH))
        alone += solved[0] if solved else ()
        best += solved[-1] if solved else ()
    yield tuple(alone)
    yield tuple(best)


def _solved(problem: Problem, kinds: Kinds, found: Sequence[Column], keep: int = KEEP) -> Iterator[Cells]:
    """The best whole numbers of colocated templates, then those of all if they serve more."""
    kv_bytes = float(problem.lengths.inputs.mean()) * problem.model.kv_bytes_per_token
    value = 0.0
    alone = [column for column in found if column.role == "colocated"]
    if alone:
        counts = best_counts(program(kinds, alone, kv_bytes))
        if counts is not None:
            value = counted_value(alone, counts)
            yield placed(kinds, alone, counts)
    if len(alone) < len(found):
        counts = best_counts(program(kinds, found, kv_bytes), keep, above=value)
        if counts is not None:
            yield placed(kinds, found, counts)


def paper_starts(problem: Problem, evaluator: Evaluator, seed: int) -> Iterator[Cells]:
    """The paper's first partitions."""
    if len(problem.cluster.gpus) > 1:
        for start in paper.starts(problem, evaluator, np.random.default_rng(seed)):
            yield start.cells


def colocated_starts(evaluator: Evaluator, partitions: Iterable[Cells]) -> Iterator[Cells]:
    """All GPUs as one group, and the groups of partitions, colocated."""
    yield (Cell(evaluator.topology.everything, "colocated"),)
    for cells in partitions:
        yield tuple(Cell(cell.members, "colocated") for cell in cells)


def placed(kinds: Kinds, found: Sequence[Column], counts: NDArray[np.int64]) -> Cells:
    """The master's groups on real nodes, so that each community of nodes prefills what it decodes.

    The groups that span most nodes come first, then the fastest; each goes where its phase lacks most.
    """
    topology = kinds.topology
    free = np.array(topology.counts)
    lacking = np.zeros(int(topology.community.max()) + 1)  # decode less prefill capacity of each community
    order = sorted(
        (v for v, count in enumerate(counts) if count), key=lambda v: (-len(found[v].parts), -found[v].rps, v)
    )
    cells: list[Cell] = []
    for v in order:
        column = found[v]
        sign = {"prefill": 1.0, "decode": -1.0, "colocated": 0.0}[column.role]
        for _ in range(int(counts[v])):
            members = kinds.best_nodes(column.parts, free, sign * lacking[topology.community])
            if members is None:
                break
            for node, gpus in members:
                free[node] -= gpus
                lacking[topology.community[node]] -= sign * column.rps * gpus / size(members)
            cells.append(Cell(members, column.role))
    return tuple(cells)
