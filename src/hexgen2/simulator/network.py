"""KV transfers that share links and NICs, max-min fair, in closed form between events.

All transfers of one route load the network alike, so they progress alike: the state is one number per route,
the tokens that a transfer under way since the beginning would have moved. A transfer ends when that number
has grown by its own tokens. Cost per event grows with routes, not with transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from heapq import heappop, heappush
from math import inf
from typing import Any

from hexgen2.cost.transfer import capacity, kv_loads, resources
from hexgen2.simulator.events import Clock
from hexgen2.simulator.placement import placement
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan


def fair_rates(
    counts: Sequence[int], loads: Sequence[Mapping[Hashable, float]], capacity: Mapping[Hashable, float]
) -> list[float]:
    """Max-min fair rates in tokens/s of one transfer on each route.

    ``counts``: transfers under way on each route; ``loads``: bytes per token that a route puts on each
    resource. The rates of all rise together until a resource is full; its transfers keep that rate, the
    others rise on. Example: routes over links {x}, {x, y}, {y} of 1 byte/token with x 10 and y 30 bytes/s: 5,
    5 and 25 tokens/s.
    """
    rates = [0.0] * len(counts)
    left = dict(capacity)
    rising = {route for route, count in enumerate(counts) if count}
    while rising:
        demand: dict[Hashable, float] = {}
        for route in sorted(rising):
            for resource, size in loads[route].items():
                demand[resource] = demand.get(resource, 0.0) + counts[route] * size
        rate, full = min(((left[key] / need, place) for place, (key, need) in enumerate(demand.items())))
        resource = list(demand)[full]
        for route in sorted(rising):
            if resource in loads[route]:
                rising.discard(route)
                rates[route] = rate
                for key, size in loads[route].items():
                    left[key] -= counts[route] * size * rate
    return rates


class Component:
    """Routes that are coupled by shared resources, and the transfers on them."""

    def __init__(
        self, events: Clock, loads: Sequence[Mapping[Hashable, float]], capacity: Mapping[Hashable, float]
    ) -> None:
        self._events = events
        self._loads = loads
        self._capacity = capacity
        self._moved = [0.0] * len(loads)
        self._rates = [0.0] * len(loads)
        self._counts = [0] * len(loads)
        self._queues: list[list[tuple[float, int, Callable[[Any], None], Any]]] = [[] for _ in loads]
        self._known: dict[tuple[int, ...], list[float]] = {}
        self._time = 0.0
        self._version = 0
        self._started = 0
        self.bytes = 0.0
        self.busy_s = 0.0
        self._bytes_per_token = [sum(load.values()) for load in loads]

    def start(self, route: int, tokens: float, call: Callable[[Any], None], argument: Any) -> None:
        """Begin to move ``tokens`` tokens on a route; ``call(argument)`` when they have arrived."""
        self._progress()
        self._started += 1
        heappush(self._queues[route], (self._moved[route] + tokens, self._started, call, argument))
        self._counts[route] += 1
        self._plan()

    def _progress(self) -> None:
        """Bring the moved tokens up to the present."""
        span = self._events.now - self._time
        self._time = self._events.now
        if span > 0 and any(self._counts):
            self.busy_s += span
            self._moved = [moved + rate * span for moved, rate in zip(self._moved, self._rates, strict=True)]

    def _plan(self) -> None:
        """Set the rates for the present transfers and ask to be called when the first of them ends."""
        key = tuple(self._counts)
        rates = self._known.get(key)
        if rates is None:
            rates = fair_rates(self._counts, self._loads, self._capacity)
            if len(self._known) < 100_000:
                self._known[key] = rates
        self._rates = rates
        wait = inf
        for queue, moved, rate in zip(self._queues, self._moved, rates, strict=True):
            if queue:
                wait = min(wait, (queue[0][0] - moved) / rate)
        self._version += 1
        if wait < inf:
            self._events.at(self._time + wait, self._end, self._version)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self._progress()
        # Rounding may leave a little to be sent: with a slack in time the same event cannot come for ever.
        slack = 1e-9 + 1e-12 * self._time
        ended: list[tuple[Callable[[Any], None], Any]] = []
        for route, queue in enumerate(self._queues):
            while queue and queue[0][0] <= self._moved[route] + self._rates[route] * slack:
                _, _, call, argument = heappop(queue)
                self._counts[route] -= 1
                ended.append((call, argument))
            if not queue:
                self._moved[route] = 0.0  # no transfer refers to it: keep the numbers small
        self._plan()
        for call, argument in ended:
            call(argument)


class Network:
    """All routes of a plan. ``loads`` and ``latencies`` by route: bytes per token on each resource, and
    seconds that pass after the last byte was sent."""

    def __init__(
        self,
        events: Clock,
        loads: Mapping[Hashable, Mapping[Hashable, float]],
        latencies: Mapping[Hashable, float],
        capacity: Mapping[Hashable, float],
    ) -> None:
        self._events = events
        self._latencies = dict(latencies)
        self._home: dict[Hashable, tuple[Component, int]] = {}
        for routes in _coupled(loads):
            component = Component(events, [loads[route] for route in routes], capacity)
            for place, route in enumerate(routes):
                self._home[route] = component, place

    def start(self, route: Hashable, tokens: float, call: Callable[[Any], None], argument: Any) -> None:
        """Move the KV cache of ``tokens`` tokens on a route; ``call(argument)`` when it has arrived."""
        component, place = self._home[route]
        latency = self._latencies[route]

        def sent(what: Any) -> None:
            self._events.at(self._events.now + latency, call, what)

        component.start(place, tokens, sent, argument)


def network_of(plan: Plan, model: Model, events: Clock) -> tuple[Network, dict[tuple[str, str], float]]:
    """The network of a plan's routes (source, target), and the bytes that a token of each sends in all."""
    cluster = plan.cluster
    loads: dict[Hashable, dict[Hashable, float]] = {}
    latencies: dict[Hashable, float] = {}
    capacities: dict[Hashable, float] = {}
    token_bytes: dict[tuple[str, str], float] = {}
    for route in plan.routes:
        key = (route.source, route.target)
        source, target = (placement(plan, plan.group_by_id[group]) for group in key)
        by_pair = kv_loads(model, source, target, 1.0)
        load = resources(cluster, by_pair)
        loads[key] = dict(load.items())
        latencies[key] = max(float(cluster.latency[pair]) for pair in by_pair)
        token_bytes[key] = sum(by_pair.values())
        capacities.update({resource: capacity(cluster, resource) for resource in load})
    return Network(events, loads, latencies, capacities), token_bytes


def _coupled(loads: Mapping[Hashable, Mapping[Hashable, float]]) -> list[list[Hashable]]:
    """Routes in sets that share no resource with each other."""
    sets: list[tuple[set[Hashable], list[Hashable]]] = []
    for route, load in loads.items():
        resources = set(load)
        members = [route]
        apart = []
        for other, routes in sets:
            if other & resources:
                resources |= other
                members = routes + members
            else:
                apart.append((other, routes))
        sets = [*apart, (resources, members)]
    return [members for _, members in sets]
