"""The max-flow network of a plan: source → prefill in/out → decode in/out → sink, solved by preflow-push.

Capacities are requests/s. Colocated groups hang between source and sink by themselves. OR-Tools' solver takes
whole numbers, so capacities are scaled to about 2⁴⁰; the loss is below 1e-12 of the flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.graph.python import max_flow

FloatArray = NDArray[np.float64]
_SCALE = float(2**40)
_UNBOUNDED = 2**50
SLACK = 1e-9


@dataclass(frozen=True)
class Network:
    """Capacities in requests/s: prefill groups (P,), decode groups (D,), routes (P, D), colocated groups (C,).

    A route of capacity 0 is no route.
    """

    prefill: FloatArray
    decode: FloatArray
    routes: FloatArray
    colocated: FloatArray

    @property
    def ceiling(self) -> float:
        """A flow that no routes could exceed: the lesser of both phases, and the colocated groups."""
        return float(min(self.prefill.sum(), self.decode.sum()) + self.colocated.sum())


@dataclass(frozen=True)
class Flow:
    """A maximum flow in requests/s, its residual capacities and the minimum cut that proves it maximal.

    ``cut`` has the network's elements across the minimum cut nearest to the source: ("prefill", i),
    ("decode", j), ("route", i, j), ("colocated", k).
    """

    network: Network
    value: float
    prefill: FloatArray
    decode: FloatArray
    routes: FloatArray
    cut: tuple[tuple[str | int, ...], ...]

    @property
    def prefill_use(self) -> FloatArray:
        """(P,) flow / capacity; 0 for a group without capacity."""
        return _use(self.prefill, self.network.prefill)

    @property
    def decode_use(self) -> FloatArray:
        """(D,) flow / capacity; 0 for a group without capacity."""
        return _use(self.decode, self.network.decode)


def solve(network: Network) -> Flow:
    """The maximum flow of the network."""
    count_p, count_d = network.routes.shape
    alone = float(network.colocated.sum())
    everywhere = tuple(("colocated", k) for k in range(len(network.colocated)))
    if network.prefill.sum() <= 0 or network.decode.sum() <= 0:
        nothing = np.zeros((count_p, count_d))
        return Flow(network, alone, np.zeros(count_p), np.zeros(count_d), nothing, everywhere)

    scale = float(_SCALE / max(network.prefill.sum(), network.decode.sum()))
    source, sink = 0, 1
    p_in = 2 + np.arange(count_p)
    p_out = p_in + count_p
    d_in = 2 + 2 * count_p + np.arange(count_d)
    d_out = d_in + count_d
    from_p, to_d = np.nonzero(network.routes > 0)
    tails = np.concatenate([np.full(count_p, source), p_in, p_out[from_p], d_in, d_out])
    heads = np.concatenate([p_in, p_out, d_in[to_d], d_out, np.full(count_d, sink)])
    routed = np.minimum(network.routes[from_p, to_d] * scale, _UNBOUNDED)
    capacities = np.concatenate(
        [
            np.full(count_p, _UNBOUNDED),
            network.prefill * scale,
            routed,
            network.decode * scale,
            np.full(count_d, _UNBOUNDED),
        ]
    ).astype(np.int64)

    solver = max_flow.SimpleMaxFlow()
    arcs = solver.add_arcs_with_capacity(tails, heads, capacities)
    status = solver.solve(source, sink)
    assert status == solver.OPTIMAL, f"max-flow ended with {status}"
    flows = solver.flows(arcs) / scale
    reached = np.zeros(2 + 2 * count_p + 2 * count_d, dtype=bool)
    reached[solver.get_source_side_min_cut()] = True

    routes = np.zeros((count_p, count_d))
    routes[from_p, to_d] = flows[2 * count_p : 2 * count_p + len(from_p)]
    cut: list[tuple[str | int, ...]] = []
    cut += [("prefill", i) for i in range(count_p) if reached[p_in[i]] and not reached[p_out[i]]]
    cut += [
        ("route", int(i), int(j))
        for i, j in zip(from_p, to_d, strict=True)
        if reached[p_out[i]] and not reached[d_in[j]]
    ]
    cut += [("decode", j) for j in range(count_d) if reached[d_in[j]] and not reached[d_out[j]]]
    value = solver.optimal_flow() / scale + alone
    return Flow(network, value, routes.sum(axis=1), routes.sum(axis=0), routes, (*cut, *everywhere))


def cut_value(flow: Flow) -> float:
    """The capacity of the minimum cut: equal to the flow when the flow is maximal."""
    network = flow.network
    total = 0.0
    for kind, *place in flow.cut:
        capacities = {
            "prefill": network.prefill,
            "decode": network.decode,
            "route": network.routes,
            "colocated": network.colocated,
        }[str(kind)]
        total += float(capacities[tuple(int(index) for index in place)])
    return total


def phrase(role: str, ids: Sequence[str], total: int) -> str:
    """A role and some of its ``total`` groups, in words."""
    if len(ids) == total and total > 1:
        return f"{role} (all {total} groups)"
    return f"{role} ({', '.join(ids)})"


def _use(flow: FloatArray, capacity: FloatArray) -> FloatArray:
    return np.divide(flow, capacity, out=np.zeros_like(flow), where=capacity > 0)
