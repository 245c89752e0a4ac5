"""The final shares of a solution: how much each route carries, and what limits the whole.

``coupled`` counts the links and NICs that several routes share (DESIGN section 5); without it every route has
its own capacity, as in the paper. Either way the load is then spread as evenly over each phase as its flow
allows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.flow import describe_cut, phrase
from hexgen2.scheduler.routes import RouteShares, balanced, best_shares
from hexgen2.scheduler.solution import Solution, route_program
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Bottleneck, Role

FloatArray = NDArray[np.float64]
PRICED = 1e-6
"""Shadow price (requests/s per request/s, or per whole resource in parts of the flow) that counts as one."""


@dataclass(frozen=True)
class Settled:
    """Requests/s: in all, by route (P, D), and by colocated group (C,); ``best``: the program's prices."""

    value: float
    routes: FloatArray
    colocated: FloatArray
    best: RouteShares | None

    def carried(self, role: Role, row: int) -> float:
        """Requests/s through a group."""
        if role == "prefill":
            return float(self.routes[row].sum())
        if role == "decode":
            return float(self.routes[:, row].sum())
        return float(self.colocated[row])


def settle(evaluator: Evaluator, solution: Solution, *, coupled: bool) -> Settled:
    """The shares of the plan."""
    network = solution.flow.network
    program = route_program(evaluator, solution, coupled=coupled)
    routes = np.zeros(network.routes.shape)
    best = best_shares(program) if coupled else None
    total = best.value if best else solution.value - float(network.colocated.sum())
    routes[program.sources, program.targets] = balanced(program, total)
    return Settled(total + float(network.colocated.sum()), routes, network.colocated, best)


def bottleneck(
    settled: Settled,
    solution: Solution,
    cluster: Cluster,
    prefill: Sequence[str],
    decode: Sequence[str],
    colocated: Sequence[str],
) -> Bottleneck:
    """What limits the plan: the minimum cut, or with shared links everything that has a shadow price."""
    if settled.best is None:
        return describe_cut(solution.flow, prefill, decode, colocated)
    best = settled.best
    groups_p = [name for name, price in zip(prefill, best.prefill_price, strict=True) if price > PRICED]
    groups_d = [name for name, price in zip(decode, best.decode_price, strict=True) if price > PRICED]
    least = PRICED * max(settled.value, 1e-300)
    paths = [resource_name(cluster, name) for name, price in best.resource_price.items() if price > least]
    parts = [
        phrase(role, names, len(every))
        for role, names, every in (
            ("prefill", groups_p, prefill),
            ("decode", groups_d, decode),
            ("colocated", list(colocated), colocated),
        )
        if names
    ]
    parts += [f"the {path}" for path in paths]
    verb = "is" if len(parts) == 1 else "are"
    text = f"{', '.join(parts[:-1])}{' and ' if parts[:-1] else ''}{parts[-1]} {verb} at capacity"
    return Bottleneck(elements=(*groups_p, *groups_d, *colocated, *paths), text=text)


def resource_name(cluster: Cluster, resource: Hashable) -> str:
    """A network resource in words."""
    assert isinstance(resource, tuple)
    kind, *where = resource
    if kind == "link":
        return f"link {cluster.nodes[where[0]].name}→{cluster.nodes[where[1]].name}"
    if kind == "gpu_out":
        return f"port of GPU {where[1]} of prefill group {where[0]}"
    direction = "outgoing" if kind == "nic_out" else "incoming"
    return f"NIC of {cluster.nodes[where[0]].name} ({direction})"
