"""The final shares of a solution: how much each route carries, and what limits the whole.

Links, NICs and ports that several routes share are counted (DESIGN section 5), whatever the search counted, so
that the plans of all solvers are valued alike. The load is then spread as evenly over each phase as the flow
allows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexgen2.cost.goodput import LINK_LOAD
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.flow import phrase
from hexgen2.scheduler.routes import RouteShares, balanced, best_shares, resource_use
from hexgen2.scheduler.solution import Solution, route_program
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Bottleneck, Role

FloatArray = NDArray[np.float64]
PRICED = 1e-6
"""Shadow price (requests/s per request/s, or per whole resource in parts of the flow) that counts as one."""
IDLE = "-"
"""Stands for a group that carries nothing, which has no id in the plan."""


@dataclass(frozen=True)
class Settled:
    """Requests/s: in all, by route (P, D), and by colocated group (C,); ``best``: the program's prices.

    ``busy``: the part of each network resource in use.
    """

    value: float
    routes: FloatArray
    colocated: FloatArray
    best: RouteShares
    busy: dict[Hashable, float]

    def carried(self, role: Role, row: int) -> float:
        """Requests/s through a group."""
        if role == "prefill":
            return float(self.routes[row].sum())
        if role == "decode":
            return float(self.routes[:, row].sum())
        return float(self.colocated[row])


def settle(evaluator: Evaluator, solution: Solution) -> Settled:
    """The shares of the plan."""
    network = solution.flow.network
    program = solution.program or route_program(evaluator, solution)
    best = solution.shares or best_shares(program)
    routes = np.zeros(network.routes.shape)
    carried = balanced(program, best.value)
    routes[program.sources, program.targets] = carried
    total = best.value + float(network.colocated.sum())
    # Under goodput the program gives links only a part of their speed, and prompts' queues are no network.
    room = 1.0 if evaluator.targets is None else LINK_LOAD
    use = resource_use(program, carried)
    busy: dict[Hashable, float] = {}
    for name, part in use.items():
        if isinstance(name, tuple) and name[0] != "prompts":
            busy[name] = room * part
    return Settled(total, routes, network.colocated, best, busy)


def bottleneck(
    settled: Settled,
    cluster: Cluster,
    prefill: Sequence[str],
    decode: Sequence[str],
    colocated: Sequence[str],
) -> Bottleneck:
    """What limits the plan: everything that has a shadow price."""
    best = settled.best
    groups_p = [name for name, price in zip(prefill, best.prefill_price, strict=True) if price > PRICED]
    groups_d = [name for name, price in zip(decode, best.decode_price, strict=True) if price > PRICED]
    least = PRICED * max(settled.value, 1e-300)
    paths = [
        resource_name(cluster, name, prefill) for name, price in best.resource_price.items() if price > least
    ]
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


def resource_name(cluster: Cluster, resource: Hashable, prefill: Sequence[str]) -> str:
    """A network resource in words; ``prefill``: ids of the prefill groups by row."""
    assert isinstance(resource, tuple)
    kind, *where = resource
    if kind == "link":
        return f"link {cluster.nodes[where[0]].name}→{cluster.nodes[where[1]].name}"
    if kind == "gpu_out":
        return f"port of GPU {where[1]} of {prefill[where[0]]}"
    if kind == "prompts":
        return f"queue of prompts at {prefill[where[0]]}"
    direction = "outgoing" if kind == "nic_out" else "incoming"
    return f"NIC of {cluster.nodes[where[0]].name} ({direction})"
