"""The paper's ablations: its starts and its network, with the guided swaps replaced.

`random_swap` climbs with random moves; `genetic` evolves whole groupings. Both value at most `STATES` states
when no time is given, or go on until time is over.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hexgen2.scheduler import moves, paper
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.feasible import no_disaggregation
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.problem import Budget, Problem
from hexgen2.scheduler.refine import climb
from hexgen2.scheduler.solution import Cell, Solution, assess, better
from hexgen2.scheduler.topology import Members, combined, members_of
from hexgen2.specs.plan import Role

STATES = 3000
POPULATION = 24
TOURNAMENT = 3
MUTATED = 0.7
"""Part of the children that are changed by a random move besides being crossed."""
TRIES = 400
"""Random moves from one state before it counts as stuck."""


def random_swap(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """The paper's starts, climbed by moves drawn at random instead of read from the residual network."""
    rng = np.random.default_rng(seed)
    _limit(budget)

    def any_move(solution: Solution) -> Iterator[Cells]:
        for _ in range(TRIES):
            yield moves.shaken(solution, rng, 1, colocated=False)

    best: Solution | None = None
    seen: set[frozenset[Cell]] = set()
    while best is None or not budget.over:
        for start in paper.starts(problem, evaluator, rng):
            found = climb(evaluator, start, any_move, budget, seen)
            best = found if best is None or better(found, best) else best
            if budget.over and best.value > 0:
                break
        if budget.limit_s is None:
            break
    if best is None or best.value <= 0:
        raise no_disaggregation(evaluator)
    return best


def genetic(problem: Problem, evaluator: Evaluator, seed: int, budget: Budget) -> Solution:
    """A genetic algorithm over groupings, begun from the paper's starts and random changes of them."""
    rng = np.random.default_rng(seed)
    _limit(budget)
    best = evolve(evaluator, [start.cells for start in paper.starts(problem, evaluator, rng)], rng, budget)
    if best.value <= 0:
        raise no_disaggregation(evaluator)
    return best


def evolve(
    evaluator: Evaluator,
    first: list[Cells],
    rng: np.random.Generator,
    budget: Budget,
    *,
    roles: tuple[Role, ...] = ("prefill", "decode"),
) -> Solution:
    """Steady-state evolution: the child of two tournament winners takes the worst's place if it is better."""
    population = [_value(evaluator, cells) for cells in first[:POPULATION]]
    while len(population) < POPULATION:
        parent = population[int(rng.integers(len(first)))]
        population.append(_value(evaluator, _mutated(parent, rng, roles, times=3)))
        budget.count_state()
    population.sort(key=lambda solution: solution.rank, reverse=True)
    while not budget.over:
        parents = [_winner(population, rng) for _ in range(2)]
        cells = crossed(parents[0].cells, parents[1].cells, evaluator.topology.everything, rng)
        child = _value(evaluator, cells)
        if rng.random() < MUTATED and child.cells:
            child = _value(evaluator, _mutated(child, rng, roles, times=1))
        budget.count_state()
        if child.rank > population[-1].rank:
            population[-1] = child
            population.sort(key=lambda solution: solution.rank, reverse=True)
            budget.report("evolve", population[0].value)
    return population[0]


def crossed(first: Cells, second: Cells, everything: Members, rng: np.random.Generator) -> Cells:
    """Half of the first parent's groups whole, then what the second parent's can have of the GPUs left."""
    kept = [cell for cell in first if rng.random() < 0.5]
    left = dict(everything)
    for cell in kept:
        for node, count in cell.members:
            left[node] -= count
    cells = list(kept)
    for cell in second:
        part = members_of({node: min(count, left[node]) for node, count in cell.members})
        if part:
            for node, count in part:
                left[node] -= count
            cells.append(Cell(part, cell.role))
    rest = members_of(left)
    if rest and cells:
        at = int(rng.integers(len(cells)))
        cells[at] = Cell(combined(cells[at].members, rest), cells[at].role)
    return tuple(cells)


def _mutated(solution: Solution, rng: np.random.Generator, roles: tuple[Role, ...], times: int) -> Cells:
    if roles == ("colocated",):
        cells = moves.shaken(solution, rng, times, colocated=True)
        return tuple(Cell(cell.members, "colocated") for cell in cells)
    return moves.shaken(solution, rng, times, colocated=False)


def _winner(population: list[Solution], rng: np.random.Generator) -> Solution:
    return population[int(rng.integers(len(population), size=TOURNAMENT).min())]


def _value(evaluator: Evaluator, cells: Cells) -> Solution:
    solution = assess(evaluator, cells)
    assert solution is not None, "no lower limit was given"
    return solution


def _limit(budget: Budget) -> None:
    if budget.limit_s is None:
        budget.states = STATES
