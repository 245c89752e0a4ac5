"""Exact routing shares: the linear program over routes that share links and NICs (HiGHS).

Maximise Σ x_ij over routes (i prefill, j decode), in requests/s, where every prefill group gives at most its
capacity, every decode group takes at most its own, and the KV bytes of all routes that cross a link, a NIC or a
GPU's port stay within what it carries. A second program keeps that total and spreads the load: it minimises the
highest use of a prefill group plus the highest use of a decode group. Among ties it takes the routes that keep
the network busy for the shortest time, since a request waits for its KV cache.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_matrix, csr_matrix, hstack, vstack

NETWORK_WEIGHT = 1e-4
"""What a request/s (of the largest group's) over the slowest route weighs beside a phase's highest use: enough
to choose among ties, too little to unbalance the groups by more."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Loads = tuple[tuple[Hashable, float], ...]
"""(resource, seconds that one request keeps it busy): bytes / the resource's bytes per second."""


@dataclass(frozen=True)
class RouteProgram:
    """Groups' capacities (requests/s), the routes between them, and what each route's request costs resources.

    ``sources`` and ``targets`` (R,) are rows among the prefill and the decode groups; ``loads[r]`` are seconds
    of each shared resource that one request on route r takes. A resource carries at most one second per second.
    """

    prefill: FloatArray
    decode: FloatArray
    sources: IntArray
    targets: IntArray
    loads: Sequence[Loads]


@dataclass(frozen=True)
class RouteShares:
    """Requests/s of each route (R,), their sum, and what one unit more of each limit would add to the sum.

    ``prefill_price``, ``decode_price``: requests/s gained per request/s of capacity; ``resource_price``:
    requests/s gained per resource that were faster by the whole of itself (per unit of relative capacity).
    """

    value: float
    routes: FloatArray
    prefill_price: FloatArray
    decode_price: FloatArray
    resource_price: dict[Hashable, float]


def resource_use(program: RouteProgram, routes: FloatArray) -> dict[Hashable, float]:
    """Seconds per second that each resource is busy under given requests/s by route."""
    use: dict[Hashable, float] = {}
    for flow, loads in zip(routes, program.loads, strict=True):
        if flow > 0:
            for resource, seconds in loads:
                use[resource] = use.get(resource, 0.0) + float(flow) * seconds
    return use


def best_shares(program: RouteProgram) -> RouteShares:
    """The largest total that the groups and the network carry."""
    count = len(program.sources)
    nothing_p, nothing_d = np.zeros(len(program.prefill)), np.zeros(len(program.decode))
    if count == 0:
        return RouteShares(0.0, np.zeros(0), nothing_p, nothing_d, {})
    scale = _scale(program)
    matrix, limits, names = _constraints(program, scale)
    solved = linprog(-np.ones(count), A_ub=matrix, b_ub=limits, method="highs")
    assert solved.status == 0, f"the route program ended with: {solved.message}"
    prices = -np.asarray(solved.ineqlin.marginals)
    split = len(program.prefill), len(program.prefill) + len(program.decode)
    routes: FloatArray = np.maximum(solved.x, 0.0) * scale
    return RouteShares(
        value=float(routes.sum()),
        routes=routes,
        prefill_price=prices[: split[0]] * scale / program.prefill,
        decode_price=prices[split[0] : split[1]] * scale / program.decode,
        resource_price={
            name: float(price) * scale for name, price in zip(names, prices[split[1] :], strict=True)
        },
    )


def most_carried(program: RouteProgram) -> FloatArray:
    """(R,) requests/s by route whose sum is largest: `best_shares` without prices, in a third of the time."""
    count = len(program.sources)
    if count == 0:
        return np.zeros(0)
    scale = _scale(program)
    matrix, limits, _ = _constraints(program, scale)
    solved = milp(-np.ones(count), constraints=LinearConstraint(matrix, -np.inf, limits), bounds=Bounds(0.0))
    assert solved.status == 0, f"the route program ended with: {solved.message}"
    routes: FloatArray = np.maximum(solved.x, 0.0) * scale
    return routes


def balanced(program: RouteProgram, total: float) -> FloatArray:
    """(R,) requests/s by route that sum to ``total`` and load the groups of each phase as evenly as possible,
    over routes as fast as that leaves.

    ``total`` must be attainable; a relative 1e-9 of it is given up against rounding.
    """
    count = len(program.sources)
    if count == 0 or total <= 0:
        return np.zeros(count)
    scale = _scale(program)
    matrix, bounds, _ = _constraints(program, scale)
    phases = len(program.prefill), len(program.decode)
    # Two more variables: the highest use of either phase. Σ_j x_ij ≤ u·capacity takes the place of ≤ capacity.
    uses = np.zeros((matrix.shape[0], 2))
    uses[: phases[0], 0] = -1.0
    uses[phases[0] : sum(phases), 1] = -1.0
    bounds[: sum(phases)] = 0.0
    goal = -np.concatenate([np.ones(count), np.zeros(2)])[None, :]
    network_s = np.array([sum(seconds for _, seconds in loads) for loads in program.loads])
    slowness = network_s / max(network_s.max(), 1e-300)
    solved = linprog(
        np.concatenate([NETWORK_WEIGHT * slowness, np.ones(2)]),
        A_ub=vstack([hstack([matrix, csr_matrix(uses)]), csr_matrix(goal)], format="csr"),
        b_ub=np.append(bounds, -total / scale * (1 - 1e-9)),
        bounds=[(0, None)] * count + [(0, 1), (0, 1)],
        method="highs",
    )
    if solved.status != 0:  # within rounding of infeasible: the unbalanced shares stand
        return best_shares(program).routes
    routes: FloatArray = np.maximum(solved.x[:count], 0.0) * scale
    spread: FloatArray = routes * (total / routes.sum())
    return spread


def _scale(program: RouteProgram) -> float:
    return float(max(program.prefill.max(), program.decode.max(), 1e-300))


def _constraints(program: RouteProgram, scale: float) -> tuple[csr_matrix, FloatArray, list[Hashable]]:
    """(rows × routes, their limits, names of the resource rows), for flows in units of ``scale`` requests/s.

    Every row is of the order of 1, so that the solver's absolute tolerance is a relative one.
    """
    count = len(program.sources)
    groups = len(program.prefill) + len(program.decode)
    place: dict[Hashable, int] = {}
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for route, loads in enumerate(program.loads):
        for resource, seconds in loads:
            rows.append(groups + place.setdefault(resource, len(place)))
            columns.append(route)
            values.append(seconds * scale)
    each = np.arange(count)
    all_rows = np.concatenate(
        [program.sources, len(program.prefill) + program.targets, np.array(rows, dtype=int)]
    )
    all_columns = np.concatenate([each, each, np.array(columns, dtype=int)])
    per_flow = scale / np.concatenate([program.prefill[program.sources], program.decode[program.targets]])
    all_values = np.concatenate([per_flow, np.array(values, dtype=float)])
    shape = (groups + len(place), count)
    matrix: csr_matrix = coo_matrix((all_values, (all_rows, all_columns)), shape=shape).tocsr()
    return matrix, np.ones(shape[0]), list(place)
