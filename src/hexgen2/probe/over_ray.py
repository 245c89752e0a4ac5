"""Every node of a Ray cluster and the links between them, measured in rounds that do not disturb each other."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from hexgen2.calibrate.links import SIZES, LinkFit, Transport
from hexgen2.deploy.raycluster import RayCluster, RayNode
from hexgen2.probe.found import Found, FoundLink, FoundNode, FoundType
from hexgen2.probe.machine import Devices
from hexgen2.probe.on_node import LinkEnd, describe, has_nixl
from hexgen2.probe.tournament import rounds
from hexgen2.specs.errors import InputError

Tell = Callable[[str], None]

NODE_S = 300.0
LINK_S = 900.0
"""How long a node may take to describe itself, and a link to be measured (2 GiB each way)."""


@dataclass(frozen=True)
class Asked:
    """What to find out. ``transport``: by what links are measured; by default NIXL between nodes with GPUs
    where all have it, else TCP."""

    devices: Devices = "auto"
    cpu_devices: int | None = None
    name: str | None = None
    transport: Transport | None = None
    sizes: Sequence[int] = SIZES


def probe_cluster(ray: RayCluster, asked: Asked, tell: Tell = lambda _: None) -> Found:
    """Describe the nodes of a Ray cluster. InputError where one cannot be described or measured."""
    nodes, devices = _worth(ray.nodes(), asked, tell)
    names = dict(zip((node.id for node in nodes), unique([node.title for node in nodes]), strict=True))
    machines = _described(ray, nodes, names, devices, asked.cpu_devices, tell)
    transport = asked.transport or _transport(ray, nodes, devices)
    measured = _links(ray, nodes, names, transport, asked.sizes, tell)
    return together(asked.name or "ray-cluster", [machines[node.id] for node in nodes], measured, transport)


def _worth(nodes: Sequence[RayNode], asked: Asked, tell: Tell) -> tuple[Sequence[RayNode], Devices]:
    """The nodes to describe, and which of their devices: those with GPUs where there are some, else those with
    CPUs. A head without either only holds the cluster together."""
    devices: Devices = "cpu" if asked.cpu_devices and asked.devices == "auto" else asked.devices
    gpus = [node for node in nodes if node.resources.get("GPU", 0) > 0]
    if devices == "auto":
        devices = "gpu" if gpus else "cpu"
    kind = "GPU" if devices == "gpu" else "CPU"
    chosen = gpus if devices == "gpu" else [node for node in nodes if node.resources.get("CPU", 0) > 0]
    if not chosen:
        raise InputError(
            "--ray", "", f"no node has {kind}s for Ray", "start some with `ray start --address ...`"
        )
    for node in nodes:
        if node not in chosen:
            tell(f"{node.title} ({node.address}) has no {kind}s for Ray: left out")
    return chosen, devices


def _described(
    ray: RayCluster,
    nodes: Sequence[RayNode],
    names: Mapping[str, str],
    devices: Devices,
    cpu_devices: int | None,
    tell: Tell,
) -> dict[str, Found]:
    """What each node has, by its id. Nodes at one address are one machine, and do not measure together."""
    waiting: dict[str, list[RayNode]] = defaultdict(list)
    for node in nodes:
        waiting[node.address].append(node)
    found: dict[str, Found] = {}
    while any(waiting.values()):
        now = [queue.pop(0) for queue in waiting.values() if queue]
        asked = [ray.call(node, describe, devices, cpu_devices, names[node.id], node.address) for node in now]
        for node, reference in zip(now, asked, strict=True):
            found[node.id] = ray.result(node, reference, NODE_S)
            tell(f"{names[node.id]} ({node.address}) is described, {len(found)} of {len(nodes)}")
    return found


def _transport(ray: RayCluster, nodes: Sequence[RayNode], devices: Devices) -> Transport:
    if devices != "gpu":
        return "tcp"
    have = [ray.result(node, ray.call(node, has_nixl)) for node in nodes]
    return "nixl" if all(have) else "tcp"


def _links(
    ray: RayCluster,
    nodes: Sequence[RayNode],
    names: Mapping[str, str],
    transport: Transport,
    sizes: Sequence[int],
    tell: Tell,
) -> dict[tuple[str, str], LinkFit]:
    """The link between any two nodes, by their names."""
    if len(nodes) < 2:
        return {}
    actor = ray.ray.remote(LinkEnd)
    ends = {
        node.id: actor.options(num_cpus=0, scheduling_strategy=ray.on(node.id)).remote(node.address)
        for node in nodes
    }
    ports = {node.id: ray.result(node, ends[node.id].port.remote()) for node in nodes}
    total, found = math.comb(len(nodes), 2), {}

    def reading(reader: RayNode, source: RayNode) -> Any:
        return ends[reader.id].read.remote(source.address, ports[source.id], transport, tuple(sizes))

    try:
        for pairs in rounds(nodes):
            # One way after the other, so that no node both sends and receives.
            there = [reading(a, b) for a, b in pairs]
            fits = [ray.result(a, one, LINK_S) for (a, _), one in zip(pairs, there, strict=True)]
            back = [reading(b, a) for a, b in pairs]
            for (a, b), first, one in zip(pairs, fits, back, strict=True):
                fit = slower(first, ray.result(b, one, LINK_S))
                found[names[a.id], names[b.id]] = fit
                tell(
                    f"{names[a.id]} - {names[b.id]}: {fit.bandwidth * 8e-9:.3g} Gb/s, "
                    f"{fit.latency * 1e3:.2g} ms, link {len(found)} of {total}"
                )
    finally:
        for end in ends.values():
            ray.ray.kill(end)
    return found


def slower(a: LinkFit, b: LinkFit) -> LinkFit:
    """The worse of both directions in each figure."""
    return LinkFit(min(a.bandwidth, b.bandwidth), max(a.latency, b.latency), max(a.error, b.error))


def unique(names: Sequence[str]) -> list[str]:
    """Names, of which the later ones that are taken get a number.

    >>> unique(["gpu", "gpu", "cpu"])
    ['gpu', 'gpu-2', 'cpu']
    """
    seen: Counter[str] = Counter()
    found: list[str] = []
    for name in names:
        seen[name] += 1
        while (new := name if seen[name] == 1 else f"{name}-{seen[name]}") in found:
            seen[name] += 1
        found.append(new)
    return found


def together(
    name: str, machines: Sequence[Found], measured: Mapping[tuple[str, str], LinkFit], transport: Transport
) -> Found:
    """The machines as one cluster. ``measured``: the links between them, by their names."""
    types: list[FoundType] = []
    nodes: list[FoundNode] = []
    links: list[FoundLink] = []
    members: dict[str, list[str]] = {}
    for machine in machines:
        renamed = _merged(types, machine)
        best = max((fit.bandwidth for pair, fit in measured.items() if machine.name in pair), default=None)
        members[machine.name] = []
        for node in machine.nodes:
            own = _name(machine, str(node.fields["name"]))
            fields = {**node.fields, "name": own, "gpu": renamed.get(node.fields["gpu"], node.fields["gpu"])}
            remarks = (*machine.remarks, *node.remarks) if node is machine.nodes[0] else node.remarks
            if best is not None and len(machine.nodes) == 1:
                # It carries that much, and what else it could is not known: better too little than each
                # link's bandwidth at the same time.
                fields["nic_gbps"] = _round(best * 8e-9)
                remarks = (
                    *remarks,
                    "nic_gbps is its fastest link's bandwidth; give the NIC's if that is more.",
                )
            nodes.append(FoundNode(fields, remarks))
            members[machine.name].append(own)
        inside = list(combinations(members[machine.name], 2))
        for place, pair in enumerate(inside):
            assert machine.link is not None, "several nodes of a machine are joined"
            links.append(
                FoundLink({"between": list(pair), **machine.link}, machine.link_remarks if place == 0 else ())
            )
    for (a, b), fit in measured.items():
        figures = {"gbps": _round(fit.bandwidth * 8e-9), "latency_ms": _round(fit.latency * 1e3)}
        error = f"{a} - {b}: the fit's median error is {fit.error:.0%}, so take the figures with care."
        for place, pair in enumerate((one, other) for one in members[a] for other in members[b]):
            remarks = (error,) if place == 0 and fit.error > 0.2 else ()
            links.append(FoundLink({"between": list(pair), **figures}, remarks))
    words = "NIXL" if transport == "nixl" else "one TCP connection"
    remark = (
        f"Links between machines were measured by reads of 4 KiB to 64 MiB over {words}, each way, the worse "
        "of both; pairs that share no machine at the same time."
    )
    return Found(name, tuple(nodes), tuple(types), None, (), (remark,) if measured else (), tuple(links))


def _name(machine: Found, node: str) -> str:
    """A node's name in the cluster: of its machine, with its own where the machine has several."""
    if len(machine.nodes) == 1:
        return machine.name
    return node if node.startswith(f"{machine.name}-") else f"{machine.name}-{node}"


def _merged(types: list[FoundType], machine: Found) -> dict[str, str]:
    """Take a machine's types over; those of which another one has the name get another, by the old one."""
    renamed: dict[str, str] = {}
    for kind in machine.types:
        name = str(kind.fields["name"])
        if any(kind.fields == known.fields for known in types):
            continue
        if any(known.fields["name"] == name for known in types):
            renamed[name] = f"{name}-{machine.name}"
            kind = replace(kind, fields={**kind.fields, "name": renamed[name]})
        types.append(kind)
    return renamed


def _round(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
