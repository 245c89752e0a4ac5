"""Which node of a Ray cluster is which node of a plan. Pure functions of what Ray says about its nodes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hexgen2.deploy.hosts import is_loopback
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError

LABEL = "hexgen2-node"
RESOURCE = f"{LABEL}:"
"""A node's name among the custom resources: one Ray node may have several."""

OPTION = "ray"
"""What errors name as their source."""


@dataclass(frozen=True)
class RayNode:
    """A node of a Ray cluster that is alive. ``names``: the plan's nodes that it was said to be; ``resources``:
    what it has in all, by Ray's names for them."""

    id: str
    address: str
    hostname: str
    names: frozenset[str]
    resources: Mapping[str, float]

    @property
    def title(self) -> str:
        """What a plan calls it, as far as one name can be told; a host name without what node names may not
        have."""
        own = re.sub(r"[^A-Za-z0-9-]+", "-", self.hostname.partition(".")[0]).strip("-") or "node"
        return min(self.names) if self.names else own


def living(nodes: Iterable[Mapping[str, Any]]) -> tuple[RayNode, ...]:
    """The nodes that are alive of what `ray.nodes()` returns, in a lasting order."""
    found = []
    for node in nodes:
        if not node["Alive"]:
            continue
        names = {name.removeprefix(RESOURCE) for name in node["Resources"] if name.startswith(RESOURCE)}
        if label := node.get("Labels", {}).get(LABEL):
            names.add(label)
        found.append(
            RayNode(
                node["NodeID"],
                node["NodeManagerAddress"],
                node["NodeManagerHostname"],
                frozenset(names),
                dict(node["Resources"]),
            )
        )
    return tuple(sorted(found, key=lambda node: (node.address, sorted(node.names), node.id)))


@dataclass(frozen=True)
class Places:
    """Where a plan's nodes are: ``found`` by the node's name, ``missing`` with what is wrong and how to mend
    it."""

    found: Mapping[str, RayNode]
    missing: Mapping[str, tuple[str, str]]

    def require(self, names: Iterable[str]) -> None:
        """InputError for the first of these nodes that is missing."""
        for name in names:
            if name in self.missing:
                raise InputError(OPTION, f"node {name}", *self.missing[name])


def places(cluster: Cluster, nodes: Sequence[RayNode], own: str | None = None) -> Places:
    """Find each node of the cluster among Ray's.

    By its name first, as label or custom resource; then by its ``host``, as address or host name; a loopback
    host is this machine's Ray node, whose id is ``own``.
    """
    by_name: dict[str, list[RayNode]] = defaultdict(list)
    for ray_node in nodes:
        for name in ray_node.names:
            by_name[name].append(ray_node)
    found: dict[str, RayNode] = {}
    missing: dict[str, tuple[str, str]] = {}
    for node in cluster.nodes:
        candidates = by_name[node.name] or _at(node.host, nodes, own)
        if len(candidates) == 1:
            found[node.name] = candidates[0]
        elif candidates:
            where = " and ".join(one.address for one in candidates)
            missing[node.name] = (
                f"is {len(candidates)} nodes of the Ray cluster ({where})",
                f"give the label to one of them: `ray start ... --labels {LABEL}={node.name}`",
            )
        else:
            known = ", ".join(one.address for one in nodes) or "none"
            missing[node.name] = (
                f"is not in the Ray cluster (nodes: {known})",
                f"start it with `ray start ... --labels {LABEL}={node.name}`, "
                "or give the address as its host in the cluster file",
            )
    return Places(found, missing)


def _at(host: str | None, nodes: Sequence[RayNode], own: str | None) -> list[RayNode]:
    if host is None:
        return []
    at = [node for node in nodes if host in (node.address, node.hostname)]
    return at or ([node for node in nodes if node.id == own] if is_loopback(host) else [])


def claims(
    cluster: Cluster, found: Mapping[str, RayNode], node: str, gpus: Collection[str]
) -> dict[str, float]:
    """What a process with these GPUs takes of its Ray node, by Ray's names.

    GPUs as such; of CPU devices one core each, or its part of one where the node has more devices than cores.
    InputError where the node as a whole has less, or where Ray could give GPUs of another type.
    """
    place = found[node]
    here = {name for name, at in found.items() if at.id == place.id}
    devices = [gpu for gpu in cluster.gpus if cluster.nodes[gpu.node].name in here]
    vendor = next(gpu.type.vendor for gpu in devices if gpu.id in gpus)
    if vendor == "cpu":
        cores = place.resources.get("CPU", 0.0)
        share = min(1.0, int(1e4 * cores / len(devices)) / 1e4)
        if share <= 0:
            raise InputError(
                OPTION,
                f"node {node}",
                f"has no CPUs in Ray ({place.address})",
                "start it with `ray start ... --num-cpus N`",
            )
        return {"CPU": round(share * len(gpus), 4)}
    kinds = {gpu.type.name for gpu in devices}
    if len(kinds) > 1:
        raise InputError(
            OPTION,
            f"node {node}",
            f"shares its Ray node with {', '.join(sorted(here - {node}))}, and Ray cannot tell "
            f"{' from '.join(sorted(kinds))}",
            "start a Ray node for each type on that machine, with its GPUs in CUDA_VISIBLE_DEVICES",
        )
    total = place.resources.get("GPU", 0.0)
    if total < len(devices):
        raise InputError(
            OPTION,
            f"node {node}",
            f"has {len(devices)} GPUs in the plan and {total:g} in Ray ({place.address})",
            f"start it with `ray start ... --num-gpus {len(devices)}`, or probe again",
        )
    return {"GPU": float(len(gpus))}
