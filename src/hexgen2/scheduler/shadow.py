"""What more of a resource would be worth: shadow prices from the routes' program, and from planning again.

An entry is ``{resource, kind, change, gain_rps, how}``. ``how`` is "dual" (the program's price of a tenth more;
true for small changes, never too low), "resolve" (the routes of the same groups solved again) or "replan"
(planned with one more; the search being no proof, a lower bound of the gain).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.scheduler.hexgen2 import evaluator_for, moves_from, search
from hexgen2.scheduler.moves import Cells
from hexgen2.scheduler.problem import Budget, Problem
from hexgen2.scheduler.reasons import MOST_ROUTES
from hexgen2.scheduler.refine import climb
from hexgen2.scheduler.routes import RouteProgram, RouteShares, best_shares
from hexgen2.scheduler.settle import IDLE, Settled, resource_name
from hexgen2.scheduler.solution import Solution, assess, route_program
from hexgen2.scheduler.topology import Topology
from hexgen2.specs.cluster import Cluster, Node
from hexgen2.specs.plan import ShadowKind, ShadowPrice

TENTH = 0.1
RESOLVED = 4
"""Scarce network resources whose routes are solved again with twice the speed."""
MOST_STATES, LEAST_STATES, WORK = 60, 4, 20_000
"""States that the climb may value for each place of one GPU more; WORK is states × groups²."""
SEARCHED = 72
"""GPUs up to which the best place of each type is searched anew: a second or so each."""

_KINDS: dict[str, ShadowKind] = {
    "link": "link",
    "gpu_out": "port",
    "nic_out": "nic",
    "nic_in": "nic",
    "prompts": "group",
}


@dataclass(frozen=True)
class Names:
    """Ids of the groups by their rows in the network."""

    prefill: Sequence[str]
    decode: Sequence[str]
    colocated: Sequence[str]


def marginal(cluster: Cluster, solution: Solution, settled: Settled, names: Names) -> tuple[ShadowPrice, ...]:
    """What the program's prices say of every group and network resource, the dearest first."""
    network, best = solution.flow.network, settled.best
    gains: list[tuple[str, ShadowKind, float]] = []
    for ids, prices, capacities in (
        (names.prefill, best.prefill_price, network.prefill),
        (names.decode, best.decode_price, network.decode),
    ):
        gains += [(name, "group", float(p * c)) for name, p, c in zip(ids, prices, capacities, strict=True)]
    gains += [(name, "group", float(c)) for name, c in zip(names.colocated, network.colocated, strict=True)]
    for resource, price in best.resource_price.items():
        gains.append((resource_name(cluster, resource, names.prefill), _kind(resource), price))
    found = [
        ShadowPrice(resource=name, kind=kind, change="a tenth more", gain_rps=TENTH * gain, how="dual")
        for name, kind, gain in gains
        if gain > 1e-6 * settled.value and name != IDLE
    ]
    return tuple(sorted(found, key=lambda price: (-price.gain_rps, price.resource)))


def faster_links(
    cluster: Cluster, evaluator: Evaluator, solution: Solution, settled: Settled, names: Names
) -> tuple[ShadowPrice, ...]:
    """What the same groups would serve if one scarce link, NIC or port were twice as fast.

    Nothing for more than `MOST_ROUTES` routes.
    """
    best = settled.best
    if solution.flow.network.routes.size > MOST_ROUTES:
        return ()
    scarce = sorted(best.resource_price, key=lambda name: -best.resource_price[name])[:RESOLVED]
    scarce = [
        name for name in scarce if best.resource_price[name] > 1e-6 * settled.value and _kind(name) != "group"
    ]
    if not scarce:
        return ()
    program = solution.program or route_program(evaluator, solution)
    found: list[ShadowPrice] = []
    for resource in scarce:
        gain = _doubled(program, resource).value - best.value
        name = resource_name(cluster, resource, names.prefill)
        found.append(
            ShadowPrice(
                resource=name, kind=_kind(resource), change="twice the", gain_rps=max(0.0, gain), how="resolve"
            )
        )
    return tuple(sorted(found, key=lambda price: -price.gain_rps))


def more_gpus(problem: Problem, cells: Cells, value: float, seed: int) -> tuple[ShadowPrice, ...]:
    """For every GPU type what one more is worth, at the best of its nodes or as a node of its own.

    Each place is tried by a short climb from the plan's groups. Up to `SEARCHED` GPUs the best place of each
    type is then searched from the beginning. The cluster as it is gets the same climb and the same search, so
    that what more search alone finds is nobody's gain.
    """
    base = max(value, _climbed(problem, cells))
    best: dict[str, tuple[float, Cluster, str]] = {}
    for cluster, gpu, where in _grown(problem.cluster):
        gain = max(0.0, _climbed(replace(problem, cluster=cluster), cells) - base)
        if gpu not in best or gain > best[gpu][0]:
            best[gpu] = (gain, cluster, where)
    small = len(problem.cluster.gpus) <= SEARCHED
    base = max(value, _searched(problem, seed)) if small else value
    prices: list[ShadowPrice] = []
    for gpu, (gain, cluster, where) in best.items():
        if small:
            gain = max(gain, _searched(replace(problem, cluster=cluster), seed) - base)
        prices.append(ShadowPrice(resource=gpu, kind="gpu", change=where, gain_rps=gain, how="replan"))
    return tuple(sorted(prices, key=lambda price: (-price.gain_rps, price.resource)))


def _searched(problem: Problem, seed: int) -> float:
    """Requests/s of the default search from the beginning."""
    return search(problem, evaluator_for(problem), seed, Budget(lambda: 0.0)).value


def _climbed(problem: Problem, cells: Cells) -> float:
    """Requests/s after a short climb from the groups of a plan, with the fastest of the plain layouts."""
    evaluator = Evaluator(problem, best_rate)
    start = assess(evaluator, [replace(cell, template=None) for cell in cells], coupled=True)
    assert start is not None, "no lower limit was given"
    budget = Budget(lambda: 0.0, states=min(MOST_STATES, max(LEAST_STATES, WORK // max(1, len(cells)) ** 2)))
    return climb(evaluator, start, moves_from, budget, set(), coupled=True).value


def _grown(cluster: Cluster) -> Iterator[tuple[Cluster, str, str]]:
    """(the cluster with one GPU more, its type, where it is), once for each kind of node and for a new node."""
    topology = Topology(cluster)
    seen: set[Hashable] = set()
    fresh: set[str] = set()
    for place, node in enumerate(cluster.nodes):
        kind = (int(topology.node_class[place]), node.count, node.nic_gbps)
        if kind not in seen:
            seen.add(kind)
            larger = node.model_copy(update={"count": node.count + 1})
            nodes = (*cluster.nodes[:place], larger, *cluster.nodes[place + 1 :])
            yield _with_nodes(cluster, nodes), node.gpu, f"one more on {node.name}"
        if node.gpu not in fresh and cluster.network.default is not None:
            fresh.add(node.gpu)
            alone = Node(name=_fresh_name(cluster), gpu=node.gpu, count=1, nic_gbps=node.nic_gbps)
            yield _with_nodes(cluster, (*cluster.nodes, alone)), node.gpu, "one more as a node of its own"


def _fresh_name(cluster: Cluster) -> str:
    """A name that no node of the user's has."""
    name = "one-more"
    while any(node.name == name for node in cluster.nodes):
        name += "-more"
    return name


def _with_nodes(cluster: Cluster, nodes: tuple[Node, ...]) -> Cluster:
    """The cluster with other nodes (built anew: a copy would keep the old list of GPUs)."""
    return Cluster(name=cluster.name, nodes=nodes, network=cluster.network, inline_types=cluster.inline_types)


def _doubled(program: RouteProgram, resource: Hashable) -> RouteShares:
    loads = [
        tuple((name, seconds / 2 if name == resource else seconds) for name, seconds in entries)
        for entries in program.loads
    ]
    return best_shares(replace(program, loads=loads))


def _kind(resource: Hashable) -> ShadowKind:
    assert isinstance(resource, tuple)
    return _KINDS[str(resource[0])]
