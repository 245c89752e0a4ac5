"""A state of the search and its value: groups with roles, their layouts, and the flow through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hexgen2.scheduler.evaluate import Evaluator, Option
from hexgen2.scheduler.flow import Flow, Network, solve
from hexgen2.scheduler.topology import Members, without
from hexgen2.specs.plan import Role


@dataclass(frozen=True, slots=True)
class Cell:
    """A group of the search: its GPUs and its role."""

    members: Members
    role: Role


@dataclass(frozen=True)
class Solution:
    """Groups with their layouts and the maximum flow. ``options[i]`` is None where cell i holds no replica.

    ``place[i]`` is the cell's row among its role's in the network (-1 where it has none).
    """

    cells: tuple[Cell, ...]
    options: tuple[Option | None, ...]
    flow: Flow
    place: tuple[int, ...]
    idle: Members

    @property
    def value(self) -> float:
        """Requests/s."""
        return self.flow.value

    @property
    def rank(self) -> tuple[float, float, float]:
        """What the search climbs: the flow, then what it could be without routes, then all capacity.

        The last two only decide between equal flows: they lead out of states where nothing flows yet.
        """
        network = self.flow.network
        return (self.value, network.ceiling, float(network.prefill.sum() + network.decode.sum()))

    def use(self, cell: int) -> float:
        """Flow / capacity of a cell; 0 for one without replica."""
        row, role = self.place[cell], self.cells[cell].role
        if row < 0:
            return 0.0
        if role == "prefill":
            return float(self.flow.prefill_use[row])
        return float(self.flow.decode_use[row]) if role == "decode" else 1.0

    def cell_at(self, role: Role, row: int) -> int:
        """The cell in a row of the network."""
        for cell, (found, at) in enumerate(zip(self.cells, self.place, strict=True)):
            if at == row and found.role == role:
                return cell
        raise IndexError(f"no {role} group in row {row}")


def better(first: Solution, second: Solution) -> bool:
    """Whether the first is a real improvement over the second (by more than rounding)."""
    for ours, theirs in zip(first.rank, second.rank, strict=True):
        margin = 1e-9 * max(abs(ours), abs(theirs))
        if ours > theirs + margin:
            return True
        if ours < theirs - margin:
            return False
    return False


def assess(evaluator: Evaluator, cells: Sequence[Cell], at_least: float = 0.0) -> Solution | None:
    """Choose each cell's layout by the evaluator's rule and find the maximum flow.

    None when even without routes the flow would stay below ``at_least``: then no network is solved.
    """
    options = [evaluator.choose(cell.members, cell.role) for cell in cells]
    totals: dict[Role, float] = {"prefill": 0.0, "decode": 0.0, "colocated": 0.0}
    for cell, option in zip(cells, options, strict=True):
        if option is not None:
            totals[cell.role] += option.rps
    ceiling = min(totals["prefill"], totals["decode"]) + totals["colocated"]
    if ceiling < at_least * (1 - 1e-9):
        return None
    return assemble(evaluator, cells, options)


def assemble(evaluator: Evaluator, cells: Sequence[Cell], options: Sequence[Option | None]) -> Solution:
    """The solution with given layouts."""
    rows: dict[Role, list[Option]] = {"prefill": [], "decode": [], "colocated": []}
    place: list[int] = []
    for cell, option in zip(cells, options, strict=True):
        place.append(-1 if option is None else len(rows[cell.role]))
        if option is not None:
            rows[cell.role].append(option)
    routes = np.array(
        [[evaluator.route(source, target) for target in rows["decode"]] for source in rows["prefill"]]
    ).reshape(len(rows["prefill"]), len(rows["decode"]))
    network = Network(
        prefill=np.array([option.rps for option in rows["prefill"]]),
        decode=np.array([option.rps for option in rows["decode"]]),
        routes=routes,
        colocated=np.array([option.rps for option in rows["colocated"]]),
    )
    idle = evaluator.topology.everything
    for cell in cells:
        idle = without(idle, cell.members)
    return Solution(tuple(cells), tuple(options), solve(network), tuple(place), idle)
