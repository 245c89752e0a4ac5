"""Moves of the search, as new lists of cells: give GPUs, swap GPUs, flip a role, merge, split, found a group.

`guided` reads the residual network of a solution: groups and routes that are saturated in the minimum cut want
more, groups with slack can give. Moves that help a bottleneck directly come first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.routes import RouteProgram, RouteShares
from hexgen2.scheduler.solution import Cell, Solution
from hexgen2.scheduler.topology import Members, combined, size, without
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]
Cells = tuple[Cell, ...]
PRICED = 1e-6
"""Shadow price (requests/s per request/s) above which a limit counts as scarce."""
MOST_PAIRS = 200
"""Pairs of colocated groups that are tried as prefill and decode from one state."""
STEPS = (1, 2, 4)
"""How many GPUs of a node a move takes at a time (besides all of them)."""


def bottlenecks(solution: Solution) -> tuple[list[int], list[int]]:
    """(cells saturated in the minimum cut, cells at the ends of routes saturated in it), without repeats."""
    groups: list[int] = []
    ends: list[int] = []
    if solution.shares is not None and solution.program is not None:
        return _priced(solution, solution.program, solution.shares)
    for kind, *rows in solution.flow.cut:
        if kind == "route":
            ends.append(solution.cell_at("prefill", int(rows[0])))
            ends.append(solution.cell_at("decode", int(rows[1])))
        elif kind in ("prefill", "decode"):
            role: Role = "prefill" if kind == "prefill" else "decode"
            groups.append(solution.cell_at(role, int(rows[0])))
    return list(dict.fromkeys(groups)), [cell for cell in dict.fromkeys(ends) if cell not in groups]


def guided(solution: Solution, colocated: bool = False) -> Iterator[Cells]:
    """Moves that the residual network suggests, the most promising first.

    ``colocated``: whether a flip may also end in (or start from) that role.
    """
    groups, ends = bottlenecks(solution)
    cells = range(len(solution.cells))
    slack = sorted(cells, key=lambda cell: (solution.use(cell), cell))
    wanting = [*groups, *ends] or list(cells)

    for needy in groups:
        role = solution.cells[needy].role
        for donor in slack:
            if solution.cells[donor].role != role and solution.use(donor) < 1 - 1e-9:
                yield replaced(solution.cells, {donor: Cell(solution.cells[donor].members, role)})
    if solution.idle:
        for needy in wanting:
            yield from _give_from(solution.cells, needy, solution.idle)
        for role in ("prefill", "decode"):
            yield (*solution.cells, Cell(solution.idle, role))
    for needy in wanting:
        for donor in slack:
            if donor != needy:
                yield from give(solution.cells, needy, donor)
                yield from swap(solution.cells, needy, donor)
                yield merge(solution.cells, needy, donor)
    for cell in cells:
        yield from split(solution.cells, cell)
        yield from flip(solution.cells, cell, colocated)


def wider(solution: Solution) -> Iterator[Cells]:
    """Moves that colocated groups add: idle groups serve whole requests, two groups part the phases."""
    cells = solution.cells
    slack = [cell for cell in range(len(cells)) if solution.use(cell) < 1 - 1e-6]
    for cell in sorted(slack, key=lambda cell: (solution.use(cell), cell)):
        yield replaced(cells, {cell: Cell(cells[cell].members, "colocated")})
    both = [cell for cell, found in enumerate(cells) if found.role == "colocated"]
    for cell in both:
        for role in ("prefill", "decode"):
            if solution.flow.network.prefill.size:
                yield replaced(cells, {cell: Cell(cells[cell].members, role)})
    pairs = 0
    for first in both:
        for second in both:
            if first != second and pairs < MOST_PAIRS:
                pairs += 1
                yield replaced(
                    cells,
                    {
                        first: Cell(cells[first].members, "prefill"),
                        second: Cell(cells[second].members, "decode"),
                    },
                )


def shaken(solution: Solution, rng: np.random.Generator, times: int, *, colocated: bool = True) -> Cells:
    """The cells after some random moves, good or bad."""
    cells = solution.cells
    for _ in range(times):
        one = int(rng.integers(len(cells)))
        options = [*flip(cells, one, colocated), *split(cells, one)]
        if len(cells) > 1:
            other = int(rng.integers(len(cells) - 1))
            other += other >= one
            options += [*give(cells, one, other), *swap(cells, one, other), merge(cells, one, other)]
        if options:
            cells = options[int(rng.integers(len(options)))]
    return cells


def flip(cells: Cells, cell: int, colocated: bool) -> Iterator[Cells]:
    """The cell in each other role."""
    roles: tuple[Role, ...] = ("prefill", "decode", "colocated") if colocated else ("prefill", "decode")
    for role in roles:
        if role != cells[cell].role:
            yield replaced(cells, {cell: Cell(cells[cell].members, role)})


def give(cells: Cells, needy: int, donor: int) -> Iterator[Cells]:
    """GPUs of the donor, some or all of one node's, to the needy cell."""
    for node, count in cells[donor].members:
        for step in _steps(count):
            if step == size(cells[donor].members):
                continue  # that is a merge
            part: Members = ((node, step),)
            yield replaced(
                cells,
                {
                    needy: Cell(combined(cells[needy].members, part), cells[needy].role),
                    donor: Cell(without(cells[donor].members, part), cells[donor].role),
                },
            )


def swap(cells: Cells, first: int, second: int) -> Iterator[Cells]:
    """Equally or unequally many GPUs of two nodes change places between two cells."""
    for node_a, count_a in cells[first].members:
        for node_b, count_b in cells[second].members:
            if node_a == node_b:
                continue
            for step_a in _steps(count_a):
                for step_b in _steps(count_b):
                    if step_a != step_b and (step_a, step_b) != (count_a, count_b):
                        continue
                    yield exchanged(cells, first, ((node_a, step_a),), second, ((node_b, step_b),))


def exchanged(cells: Cells, first: int, from_first: Members, second: int, from_second: Members) -> Cells:
    """Two cells after they gave each other those GPUs."""
    a, b = cells[first], cells[second]
    return replaced(
        cells,
        {
            first: Cell(combined(without(a.members, from_first), from_second), a.role),
            second: Cell(combined(without(b.members, from_second), from_first), b.role),
        },
    )


def merge(cells: Cells, first: int, second: int) -> Cells:
    """Both cells as one, in the first's role."""
    joined = Cell(combined(cells[first].members, cells[second].members), cells[first].role)
    return tuple(joined if place == first else cell for place, cell in enumerate(cells) if place != second)


def split(cells: Cells, cell: int) -> Iterator[Cells]:
    """The cell as two: one node's part against the rest, or each node's count halved; with either role each."""
    members, role = cells[cell].members, cells[cell].role
    parts: list[Members] = []
    if len(members) > 1:
        parts += [((node, count),) for node, count in members]
    else:
        parts += [((node, step),) for node, count in members for step in _steps(count) if step < count]
    halves = tuple((node, count // 2) for node, count in members if count // 2)
    if halves and len(members) > 1:
        parts.append(halves)
    other: Role = "decode" if role == "prefill" else "prefill"
    for part in parts:
        rest = without(members, part)
        ways = [(role, role), (role, other), (other, role)]
        if role == "colocated":
            ways = [(role, role), ("prefill", "decode"), ("decode", "prefill")]
        for role_part, role_rest in ways:
            yield (
                *(kept for place, kept in enumerate(cells) if place != cell),
                Cell(part, role_part),
                Cell(rest, role_rest),
            )


def release(cells: Cells, cell: int) -> Iterator[Cells]:
    """The cell without some of its GPUs, which fall idle."""
    for node, count in cells[cell].members:
        for step in _steps(count):
            if step < size(cells[cell].members):
                rest = without(cells[cell].members, ((node, step),))
                yield replaced(cells, {cell: Cell(rest, cells[cell].role)})


def replaced(cells: Cells, new: dict[int, Cell]) -> Cells:
    """The cells with some exchanged for new ones."""
    return tuple(new.get(place, cell) for place, cell in enumerate(cells))


def _priced(solution: Solution, program: RouteProgram, shares: RouteShares) -> tuple[list[int], list[int]]:
    """The same from the exact routes: groups with a shadow price, and both ends of routes over priced links."""
    groups: list[int] = []
    phases: tuple[tuple[Role, FloatArray], ...] = (
        ("prefill", shares.prefill_price),
        ("decode", shares.decode_price),
    )
    for role, prices in phases:
        groups += [solution.cell_at(role, int(row)) for row in np.flatnonzero(prices > PRICED)]
    scarce = {name for name, price in shares.resource_price.items() if price > PRICED * shares.value}
    ends: list[int] = []
    for source, target, loads in zip(program.sources, program.targets, program.loads, strict=True):
        if any(resource in scarce for resource, _ in loads):
            ends.append(solution.cell_at("prefill", int(source)))
            ends.append(solution.cell_at("decode", int(target)))
    return groups, [cell for cell in dict.fromkeys(ends) if cell not in groups]


def _give_from(cells: Cells, needy: int, idle: Members) -> Iterator[Cells]:
    yield replaced(cells, {needy: Cell(combined(cells[needy].members, idle), cells[needy].role)})
    for node, count in idle:
        for step in _steps(count):
            grown = combined(cells[needy].members, ((node, step),))
            yield replaced(cells, {needy: Cell(grown, cells[needy].role)})


def _steps(count: int) -> list[int]:
    return sorted({step for step in (*STEPS, count) if step <= count})
