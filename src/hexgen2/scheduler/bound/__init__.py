"""An upper bound on every plan's objective under the cost model; docs/bound.md proves it."""

from __future__ import annotations

from math import prod

from hexgen2.scheduler.bound.additive import additive_bound
from hexgen2.scheduler.bound.grid import grid_bound
from hexgen2.scheduler.bound.groups import count_cuts
from hexgen2.scheduler.bound.linear import linear_bound
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.result import Bound
from hexgen2.scheduler.columns import Kinds
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.topology import Topology

__all__ = ["Bound", "by_grid", "upper_bound"]

CUTS = 120_000
"""Rows of stage counts up to which every group of a cluster is looked at."""
CELLS = 30_000
"""GPU counts by node, so many together, up to which they are."""


def upper_bound(evaluator: Evaluator) -> Bound:
    """Requests/s that no plan of the problem exceeds."""
    problem, topology = evaluator.problem, evaluator.topology
    if by_grid(problem, topology):
        found = grid_bound(problem, topology)
        # Ends of pipelines of unlike stages are bounded loosely there, so the other way may tell more.
        return found if problem.engine.uniform_tp else found.at_most(additive_bound(evaluator))
    if problem.engine.uniform_tp:
        value = linear_bound(problem, Places.of_kinds(Kinds(topology)))
        if value is not None:
            return Bound(value)
    return Bound(additive_bound(evaluator))


def by_grid(problem: Problem, topology: Topology) -> bool:
    """Whether a cluster is small enough to look at every group of its nodes."""
    if prod(count + 1 for count in topology.counts) > CELLS:
        return False
    return count_cuts(problem, Places.of_nodes(topology)) <= CUTS
