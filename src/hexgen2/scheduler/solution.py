"""A state of the search and its value: groups with roles, their layouts, and the flow through them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hexgen2.scheduler.evaluate import Evaluator, Option
from hexgen2.scheduler.flow import FloatArray, Flow, Network, solve
from hexgen2.scheduler.layouts import Template
from hexgen2.scheduler.routes import (
    Loads,
    RouteProgram,
    RouteShares,
    best_shares,
    most_carried,
    resource_use,
)
from hexgen2.scheduler.topology import Members, without
from hexgen2.specs.plan import Role


@dataclass(frozen=True, slots=True)
class Cell:
    """A group of the search: its GPUs, its role, and its layout where that is not the one of the rule."""

    members: Members
    role: Role
    template: Template | None = None


@dataclass(frozen=True)
class Solution:
    """Groups with their layouts and the maximum flow. ``options[i]`` is None where cell i holds no replica.

    ``place[i]`` is the cell's row among its role's in the network (-1 where it has none). ``program`` is that
    of the exact routes over shared links and NICs, ``carried`` (R,) requests/s by route that solve it; None
    where these were not asked for.
    """

    cells: tuple[Cell, ...]
    options: tuple[Option | None, ...]
    flow: Flow
    place: tuple[int, ...]
    idle: Members
    program: RouteProgram | None = None
    carried: FloatArray | None = None

    @cached_property
    def value(self) -> float:
        """Requests/s: over shared links where these were counted, else of the flow."""
        if self.carried is None:
            return self.flow.value
        return float(self.carried.sum() + self.flow.network.colocated.sum())

    @cached_property
    def shares(self) -> RouteShares | None:
        """The exact routes with their prices: solved when first asked for, since most states are soon left."""
        return None if self.program is None else best_shares(self.program)

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
        if role == "colocated":
            return 1.0
        if self.carried is None or self.program is None:
            return float((self.flow.prefill_use if role == "prefill" else self.flow.decode_use)[row])
        ends, limits = self.program.sources, self.program.prefill
        if role == "decode":
            ends, limits = self.program.targets, self.program.decode
        return float(self.carried[ends == row].sum() / limits[row])

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


def assess(
    evaluator: Evaluator, cells: Sequence[Cell], at_least: float = 0.0, *, coupled: bool = False
) -> Solution | None:
    """Choose each cell's layout by the evaluator's rule and find the maximum flow.

    ``coupled``: then also the exact routes over shared links. None when a cheaper upper bound (no routes; each
    route by itself) already stays below ``at_least``.
    """
    options = [evaluator.layout(cell.members, cell.role, cell.template) for cell in cells]
    totals: dict[Role, float] = {"prefill": 0.0, "decode": 0.0, "colocated": 0.0}
    for cell, option in zip(cells, options, strict=True):
        if option is not None:
            totals[cell.role] += option.rps
    ceiling = min(totals["prefill"], totals["decode"]) + totals["colocated"]
    if ceiling < at_least * (1 - 1e-9):
        return None
    solution = assemble(evaluator, cells, options)
    if not coupled:
        return solution
    if solution.flow.value < at_least * (1 - 1e-9):
        return None
    program = route_program(evaluator, solution)
    carried = solution.flow.routes[program.sources, program.targets]
    if max(resource_use(program, carried).values(), default=0.0) > 1 + 1e-9:
        carried = most_carried(program)
    return replace(solution, program=program, carried=carried)


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


def route_program(evaluator: Evaluator, solution: Solution) -> RouteProgram:
    """The linear program of a solution's routes."""
    network = solution.flow.network
    rows: dict[Role, list[Option]] = {"prefill": [], "decode": [], "colocated": []}
    for cell, option in zip(solution.cells, solution.options, strict=True):
        if option is not None:
            rows[cell.role].append(option)
    sources, targets = np.nonzero(network.routes > 0)
    loads: list[Loads] = []
    for i, j in zip(sources, targets, strict=True):
        found = evaluator.loads(rows["prefill"][i], rows["decode"][j])
        loads.append(tuple((_of_group(resource, int(i)), seconds) for resource, seconds in found))
    return RouteProgram(network.prefill, network.decode, sources, targets, loads)


def _of_group(resource: Hashable, group: int) -> Hashable:
    """A GPU's port and the queue of prompts are the sending group's own; links and NICs are everyone's."""
    assert isinstance(resource, tuple)
    return (resource[0], group, *resource[1:]) if resource[0] in ("gpu_out", "prompts") else resource
