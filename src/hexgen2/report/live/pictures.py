"""The pictures of a plan's page, drawn with what a running service does in place of what was planned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from hexgen2.report.page.flows import Ends, Measured, Station, flows_picture
from hexgen2.report.page.markup import Markup
from hexgen2.report.page.network import network_svg
from hexgen2.specs.plan import Group, LinkLoad, Plan

Pair = tuple[str, str]


def flows_now(groups: Sequence[Station], routes: Mapping[Ends, float], measured: Measured) -> Markup:
    """Where requests go: the shares of the routes by plan, and as measured. ``groups``: stations of one group
    each; alike ones become one box."""
    alike: dict[tuple[str, ...], list[Station]] = {}
    for group in groups:
        alike.setdefault((group.role, group.words, f"{group.share:.3g}"), []).append(group)
    stations = [
        Station(
            tuple(one.ids[0] for one in found),
            found[0].role,
            sum(one.share for one in found),
            found[0].words,
        )
        for found in alike.values()
    ]
    return flows_picture(stations, routes, measured)


def network_now(plan: Plan, kv_bytes_per_s: Mapping[Ends, float], down: Collection[str]) -> Markup:
    """The plan over the network, with the KV bytes/s that were measured on each route."""
    if not plan.links:  # the controller's plans do not say what their links carry
        plan = plan.model_copy(update={"links": _links_of_routes(plan)})
    return network_svg(plan, measured_links(plan, kv_bytes_per_s), down)


def measured_links(plan: Plan, kv_bytes_per_s: Mapping[Ends, float]) -> tuple[LinkLoad, ...]:
    """What the KV caches of the routes put on the plan's links between nodes.

    A route between groups of one node each crosses one link. Where its groups lie on several nodes, its bytes
    are spread over the links between them as the plan spread all KV caches there.
    """
    planned = {(link.source, link.target): link for link in plan.links}
    carried: dict[Pair, float] = {}
    for (source, target), rate in kv_bytes_per_s.items():
        ends = plan.group_by_id.get(source), plan.group_by_id.get(target)
        if ends[0] is None or ends[1] is None or rate <= 0:
            continue
        pairs = [pair for pair in _pairs(ends[0], ends[1]) if pair in planned]
        whole = sum(planned[pair].bytes_per_s for pair in pairs)
        for pair in pairs:
            part = planned[pair].bytes_per_s / whole if whole > 0 else 1 / len(pairs)
            carried[pair] = carried.get(pair, 0.0) + rate * part
    index = {node.name: place for place, node in enumerate(plan.cluster.nodes)}
    return tuple(
        link.model_copy(
            update={
                "bytes_per_s": carried.get((a, b), 0.0),
                "use": carried.get((a, b), 0.0) / plan.cluster.node_link(index[a], index[b]).bandwidth,
            }
        )
        for (a, b), link in planned.items()
    )


def _links_of_routes(plan: Plan) -> tuple[LinkLoad, ...]:
    """The links that the plan's routes cross, without a load."""
    known = plan.group_by_id
    pairs = {pair for route in plan.routes for pair in _pairs(known[route.source], known[route.target])}
    empty = [{"from": a, "to": b, "bytes_per_s": 0.0, "use": 0.0} for a, b in sorted(pairs)]
    return tuple(map(LinkLoad.model_validate, empty))


def _pairs(source: Group, target: Group) -> list[Pair]:
    """Pairs of unlike nodes of two groups."""
    return [(a, b) for a in _nodes(source) for b in _nodes(target) if a != b]


def _nodes(group: Group) -> list[str]:
    return list(dict.fromkeys(gpu.rsplit("/", 1)[0] for gpu in group.gpus))
