"""What a group of GPUs can do in each role: its layouts valued by the cost model, cached by signature.

Groups with equal GPUs, counts and links have equal options whatever their nodes are called, so the cost model
is asked once per signature and the result is put on the nodes at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, permutations
from math import inf

import numpy as np

from hexgen2.cost import transfer
from hexgen2.cost.capacity import decode_cycle
from hexgen2.cost.goodput import ATTAINMENT, LINK_LOAD, handover, prefill_goodput
from hexgen2.cost.layout import PlacedStage, Placement
from hexgen2.cost.queues import After, PromptQueue
from hexgen2.scheduler.engines import EngineProfile
from hexgen2.scheduler.layouts import StageTemplate, Template, chains, layer_splits, valid_tps
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.routes import Loads
from hexgen2.scheduler.stage_values import NO_LINK, StageKind, StageValues, Valued
from hexgen2.scheduler.topology import Members, Topology
from hexgen2.specs.plan import Role

Rule = Callable[[Sequence["Option"]], "Option"]
Signature = tuple[object, ...]
POLISHED = 8
"""Chains of stages of a group, the best in a role, whose layers are moved about in a thorough search."""
TRIED = 8
"""Layouts of a group whose rate within latency targets is worked out in a quick search."""


@dataclass(frozen=True, slots=True)
class Option:
    """A layout of a group in a role and what it is worth.

    ``rps``: requests/s, under goodput those within the targets (a prefill group's if nothing followed the
    prefill; what follows depends on the route). ``latency_s``: for prefill the time of one mean request alone,
    for decode and colocated groups the time per output token at ``max_batch`` sequences. ``forbidden``: the
    engine rule that keeps the layout out, None when the engine can run it. ``queue``: a prefill group's, under
    goodput.
    """

    role: Role
    template: Template
    rps: float
    max_batch: int
    latency_s: float
    forbidden: str | None = None
    queue: PromptQueue | None = field(default=None, compare=False, repr=False)

    @property
    def tps(self) -> tuple[int, ...]:
        """TP size of each stage."""
        return tuple(stage.tp for stage in self.template)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout before it has a role: nodes as places in the signature's order, and what its value came from."""

    template: Template
    valued: Valued
    chain: Sequence[Members]
    kinds: Sequence[StageKind]
    upstream: Sequence[int]


def paper_rule(options: Sequence[Option]) -> Option:
    """The paper's choice: prefill takes the lowest latency, decode (and colocated) the highest rate."""
    if options[0].role == "prefill":
        return min(options, key=lambda option: (option.latency_s, -option.rps))
    return max(options, key=lambda option: (option.rps, -option.latency_s))


def best_rate(options: Sequence[Option]) -> Option:
    """The highest rate, then the lowest latency."""
    return max(options, key=lambda option: (option.rps, -option.latency_s))


class Evaluator:
    """Values groups and routes of one problem. It holds caches and nothing else."""

    def __init__(self, problem: Problem, rule: Rule = paper_rule, *, thorough: bool = False) -> None:
        """``thorough``: every order of few nodes, and layers moved between stages while that helps."""
        self.problem = problem
        self.thorough = thorough
        self.topology = Topology(problem.cluster)
        self.rule = rule
        self.sizes = valid_tps(problem.model, max(8, max(self.topology.counts)))
        self.values = StageValues(self.topology, problem.cost, problem.cost.moments(problem.lengths))
        self._signatures: dict[Members, tuple[Signature, tuple[int, ...]]] = {}
        self._layouts: dict[Signature, list[Candidate]] = {}
        self._options: dict[tuple[Signature, Role], tuple[Option, ...]] = {}
        self._rules: dict[tuple[Signature, Role], Option | None] = {}
        self._chosen: dict[tuple[Members, Role], Option | None] = {}
        self._others: dict[tuple[Template, Role], Option | None] = {}
        self._loads: dict[tuple[Template, Template], Loads] = {}
        self._routes: dict[tuple[Template, Template], float] = {}
        self._tokens = float(problem.lengths.inputs.mean())
        self.targets = problem.targets
        self._after: dict[tuple[PromptQueue, After], float] = {}

    def under(self, engine: EngineProfile) -> Evaluator:
        """The same problem for another engine; what layouts cost is not worked out again."""
        other = Evaluator(replace(self.problem, engine=engine), self.rule, thorough=self.thorough)
        other.topology, other.values = self.topology, self.values
        other._signatures, other._layouts, other._loads = self._signatures, self._layouts, self._loads
        return other

    def options(self, members: Members, role: Role) -> tuple[Option, ...]:
        """Every layout of the group in the role that fits into memory, also those the engine forbids."""
        key, nodes = self._signature(members)
        return tuple(_on_nodes(option, nodes) for option in self._role_options(key, members, nodes, role))

    def allowed(self, members: Members, role: Role) -> tuple[Option, ...]:
        """The group's layouts in a role that the engine can run."""
        return tuple(option for option in self.options(members, role) if option.forbidden is None)

    def choose(self, members: Members, role: Role) -> Option | None:
        """The layout that the solver's rule picks for the group in the role; None when none fits."""
        try:
            return self._chosen[members, role]
        except KeyError:
            pass
        key, nodes = self._signature(members)
        if (key, role) not in self._rules:
            options = self._role_options(key, members, nodes, role)
            allowed = [option for option in options if option.forbidden is None]
            self._rules[key, role] = self.rule(allowed) if allowed else None
        found = self._rules[key, role]
        chosen = None if found is None else _on_nodes(found, nodes)
        self._chosen[members, role] = chosen
        return chosen

    def layout(self, members: Members, role: Role, template: Template | None) -> Option | None:
        """The option with the given layout, or the rule's choice when that is None."""
        chosen = self.choose(members, role)
        if template is None or (chosen is not None and chosen.template == template):
            return chosen
        listed = (option for option in self.allowed(members, role) if option.template == template)
        return next(listed, None) or self._unlisted(role, template)

    def _unlisted(self, role: Role, template: Template) -> Option | None:
        """A layout that is not among those listed: a running group was laid out for another load, or a quick
        search under latency targets left it out."""
        key = (template, role)
        if key not in self._others:
            chain = [stage.members for stage in template]
            links = self.topology.link_class
            upstream = [NO_LINK, *(int(links[a[0][0], b[0][0]]) for a, b in pairwise(chain))]
            kinds = [self.values.kind(part) for part in chain]
            layout = self._candidate(chain, kinds, [stage.layers for stage in template], upstream)
            option = self._option(role, layout) if layout.valued.max_tokens > 0 else None
            if option is not None and option.rps > 0 and self.targets is not None:
                option = self._waiting(option, layout, 0.0)
            usable = option is not None and option.rps > 0 and option.forbidden is None
            self._others[key] = option if usable else None
        return self._others[key]

    def route(self, source: Option, target: Option) -> float:
        """Requests/s that the route could carry if it had the network to itself; 0 when a rule forbids it."""
        key = (source.template, target.template)
        known = self._routes.get(key)
        if known is None:
            barred = self.problem.engine.route_rule(source.tps, target.tps) is not None
            known = 0.0 if barred else 1 / max(seconds for _, seconds in self.loads(source, target))
            self._routes[key] = known
        return known

    def loads(self, source: Option, target: Option) -> Loads:
        """Seconds that one mean request's KV cache keeps each resource on its way busy.

        Resources are those of `cost.transfer`, but ("gpu_out", k) is the source group's k-th GPU in rank order.
        Under goodput they may be loaded to `LINK_LOAD` only, and ("prompts",) is the source group's queue, of
        which a request takes the more the later its cache arrives on this route.
        """
        key = (source.template, target.template)
        known = self._loads.get(key)
        if known is None:
            first, second = self.place([source.template, target.template])
            bytes_by_pair = transfer.kv_loads(self.problem.model, first, second, self._tokens)
            rank = {gpu: k for k, gpu in enumerate(gpu for stage in first for gpu in stage.gpus)}
            shared = transfer.resources(self.problem.cluster, bytes_by_pair)
            known = tuple(
                (("gpu_out", rank[int(name[1])]) if name[0] == "gpu_out" else name, size / self._capacity(name))
                for name, size in shared.items()
            )
            if self.targets is not None:
                known = self._in_time(source, target, known)
            self._loads[key] = known
        return known

    def _in_time(self, source: Option, target: Option, loads: Loads) -> Loads:
        """A route's loads when links are to have room and the first token is to come in time."""
        assert self.targets is not None
        assert source.queue is not None, "prefill options have one under goodput"
        transfer_s = max(seconds for _, seconds in loads)
        after = handover(transfer_s, self._tokens, target.latency_s, self.problem.cost.settings)
        rate = self._after.get((source.queue, after))
        if rate is None:
            rate = prefill_goodput(source.queue, source.rps, self.targets.ttft_s, after)
            self._after[source.queue, after] = rate
        slower = tuple((name, seconds / LINK_LOAD) for name, seconds in loads)
        return (*slower, (("prompts",), 1 / rate if rate > 0 else inf))

    def _capacity(self, resource: transfer.Resource) -> float:
        """`cost.transfer.capacity` from the topology's tables."""
        if resource[0] == "link":
            return float(self.topology.bandwidth[resource[1], resource[-1]])
        if resource[0] == "gpu_out":
            return self.topology.intra[self.problem.cluster.gpus[resource[1]].node].bandwidth
        return self.problem.cluster.nic_bandwidth(resource[1])

    def place(self, groups: Sequence[Template]) -> list[Placement]:
        """Real GPUs for groups: each node's in the order of the groups, ranks in the order of the nodes."""
        free = [int(start) for start in self.topology.first]
        placements: list[Placement] = []
        for template in groups:
            placed: list[PlacedStage] = []
            layer = 0
            for stage in template:
                gpus: list[int] = []
                for node, count in stage.members:
                    gpus += range(free[node], free[node] + count)
                    free[node] += count
                placed.append(PlacedStage(tuple(gpus), layer, stage.layers))
                layer += stage.layers
            placements.append(tuple(placed))
        return placements

    def _role_options(
        self, key: Signature, members: Members, nodes: tuple[int, ...], role: Role
    ) -> tuple[Option, ...]:
        """Options with nodes given as places in ``nodes``."""
        known = self._options.get((key, role))
        if known is None:
            if key not in self._layouts:
                self._layouts[key] = self._value(members, nodes)
            layouts = self._layouts[key]
            scored = [(self._option(role, layout), layout) for layout in layouts]
            found = [(option, layout) for option, layout in scored if option.rps > 0]
            if self.thorough:
                found += [self._polished(role, layout) for layout in _best_chains(scored) if layout.kinds[1:]]
            known = tuple(option for option, _ in found) if self.targets is None else tuple(self._timely(found))
            self._options[key, role] = known
        return known

    def _timely(self, found: Sequence[tuple[Option, Candidate]]) -> Iterator[Option]:
        """The options at their rates within the targets.

        Where the highest rate wins, the most promising come first, those that cannot win are left out, and
        unless the search is thorough only `TRIED` are looked at: waiting takes long to work out.
        """
        winner = self.rule is best_rate
        best = {True: 0.0, False: 0.0}
        tried = {True: 0, False: 0}
        for option, layout in sorted(found, key=lambda pair: -self._promise(pair[0])):
            allowed = option.forbidden is None
            if winner and (option.rps <= best[allowed] or (tried[allowed] == TRIED and not self.thorough)):
                continue
            tried[allowed] += 1
            timely = self._waiting(option, layout, best[allowed] if winner else 0.0)
            if timely.rps > 0:
                best[allowed] = max(best[allowed], timely.rps)
                yield timely

    def _promise(self, option: Option) -> float:
        """Roughly the rate within the targets, for the order in which layouts are looked at.

        With exponential times 95% of the requests are through within t at a rate of 1/service − 3/t; service
        times vary less, which halves the wait.
        """
        assert self.targets is not None
        if option.role != "prefill":
            return option.rps
        left = self.targets.ttft_s - option.latency_s
        return option.rps - 1.5 / left if left > 0 else -1 / option.rps

    def _waiting(self, option: Option, layout: Candidate, above: float) -> Option:
        """The option with waiting counted; at no rate where that would not be above the given one."""
        targets, values, valued = self.targets, self.values, layout.valued
        assert targets is not None
        if option.role == "prefill":
            queue = values.prompt_queue(valued, values.prefill(valued))
            rps = prefill_goodput(queue, option.rps, targets.ttft_s, above=above)
            return replace(option, rps=rps, queue=queue)
        if option.role == "decode":
            decode = values.decode(valued, targets.tpot_s)
            return replace(option, rps=values.decode_goodput(valued, decode, above))
        shared = values.colocated(valued, targets.tpot_s)
        return replace(option, rps=values.colocated_goodput(valued, shared, targets, above))

    def fastest(self, members: Members) -> tuple[float, float]:
        """(seconds in which the stated part of all prompts is computed, seconds per token) of a group that has
        one request at a time: the least over its layouts, infinite where there are none."""
        key, nodes = self._signature(members)
        first = steady = inf
        if key not in self._layouts:
            self._layouts[key] = self._value(members, nodes)
        for layout in self._layouts[key]:
            valued = layout.valued
            prefill = self.values.prefill(valued)
            if prefill.rps > 0:
                alone = self.values.prompt_queue(valued, prefill).alone_s
                first = min(first, float(np.quantile(alone, ATTAINMENT)))
                steady = min(steady, decode_cycle(valued.costs, 1, self.values.moments.context))
        return first, steady

    def _polished(self, role: Role, layout: Candidate) -> tuple[Option, Candidate]:
        """The option after moving single layers between stages while that raises its rate."""
        best, best_layout = self._option(role, layout), layout
        split = [stage.layers for stage in layout.template]
        improved = True
        while improved:
            improved = False
            for giver, taker in permutations(range(len(split)), 2):
                if split[giver] == 1:
                    continue
                split[giver] -= 1
                split[taker] += 1
                moved = self._candidate(layout.chain, layout.kinds, split, layout.upstream)
                option = self._option(role, moved)
                if option.rps > best.rps * (1 + 1e-12):
                    best, best_layout, improved = option, moved, True
                else:
                    split[giver] += 1
                    split[taker] -= 1
        return best, best_layout

    def _candidate(
        self,
        chain: Sequence[Members],
        kinds: Sequence[StageKind],
        split: Sequence[int],
        upstream: Sequence[int],
    ) -> Candidate:
        valued = self.values.value(kinds, split, upstream)
        return Candidate(tuple(map(StageTemplate, chain, split)), valued, chain, kinds, upstream)

    def _value(self, members: Members, nodes: tuple[int, ...]) -> list[Candidate]:
        """Layouts that hold a replica, with nodes given as places in ``nodes``."""
        place = {node: index for index, node in enumerate(nodes)}
        links = self.topology.link_class
        layers = self.problem.model.layers
        found: list[Candidate] = []
        for chain in chains(self.topology, members, self.sizes, thorough=self.thorough):
            if len(chain) > layers:
                continue
            kinds = [self.values.kind(part) for part in chain]
            upstream = [NO_LINK]
            upstream += [int(links[a[0][0], b[0][0]]) for a, b in pairwise(chain)]
            local = [tuple((place[node], count) for node, count in part) for part in chain]
            for split in layer_splits(self.values, kinds, thorough=self.thorough):
                candidate = self._candidate(local, kinds, split, upstream)
                if candidate.valued.max_tokens > 0:
                    found.append(candidate)
        return found

    def _option(self, role: Role, layout: Candidate) -> Option:
        problem, template, valued = self.problem, layout.template, layout.valued
        forbidden = _forbidden(problem.engine, role, template)
        tpot = None if self.targets is None else self.targets.tpot_s
        if role == "prefill":
            prefill = self.values.prefill(valued)
            batch = max(1, prefill.max_batch)
            return Option(role, template, prefill.rps, batch, prefill.latency_s, forbidden)
        found = self.values.decode(valued, tpot) if role == "decode" else self.values.colocated(valued, tpot)
        return Option(role, template, found.rps, max(1, found.max_batch), found.tpot_s, forbidden)

    def _signature(self, members: Members) -> tuple[Signature, tuple[int, ...]]:
        """A key that equal groups share, and the group's nodes in the key's order."""
        known = self._signatures.get(members)
        if known is not None:
            return known
        classes, links = self.topology.node_class, self.topology.link_class
        nodes = [node for node, _ in members]
        counts = dict(members)
        if len(nodes) == 1:
            key: Signature = (int(classes[nodes[0]]), counts[nodes[0]])
        else:
            rank = {
                node: (int(classes[node]), counts[node], sorted(int(links[node, other]) for other in nodes))
                for node in nodes
            }
            nodes.sort(key=lambda node: (rank[node], node))
            key = (
                *((int(classes[node]), counts[node]) for node in nodes),
                *(int(links[a, b]) for place, a in enumerate(nodes) for b in nodes[:place]),
            )
        self._signatures[members] = (key, tuple(nodes))
        return self._signatures[members]


def _best_chains(scored: list[tuple[Option, Candidate]]) -> list[Candidate]:
    """The best deal of layers of each of the `POLISHED` best chains, those the engine allows first."""
    ranked = sorted(scored, key=lambda pair: (pair[0].forbidden is not None, -pair[0].rps))
    chains: dict[tuple[Members, ...], Candidate] = {}
    for _, layout in ranked:
        chains.setdefault(tuple(layout.chain), layout)
        if len(chains) == POLISHED:
            break
    return list(chains.values())


def _forbidden(engine: EngineProfile, role: Role, template: Template) -> str | None:
    """The engine rule that keeps a layout out of a role."""
    for stage in template:
        rule = engine.stage_rule([count for _, count in stage.members])
        if rule is not None:
            return rule
    return engine.group_rule(role, tuple(stage.tp for stage in template))


def _on_nodes(option: Option, nodes: tuple[int, ...]) -> Option:
    template = tuple(
        StageTemplate(tuple((nodes[place], count) for place, count in stage.members), stage.layers)
        for stage in option.template
    )
    return replace(option, template=template)
