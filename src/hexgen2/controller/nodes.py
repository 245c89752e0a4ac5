"""Which nodes are gone, as far as the engines on them tell, and which GPUs are left to plan with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hexgen2.controller.carry import Seats
from hexgen2.specs.cluster import Cluster


def lost_groups(down_s: Mapping[str, float], grace_s: float, returning: Collection[str] = ()) -> frozenset[str]:
    """Groups that have been down for longer than the grace, and that nobody is starting again.

    >>> sorted(lost_groups({"p0": 9.0, "p1": 2.0, "d0": 0.0, "d1": 9.0}, 5.0, returning=["d1"]))
    ['p0']
    """
    return frozenset(group for group, seconds in down_s.items() if seconds > grace_s and group not in returning)


def lost_nodes(seats: Seats, lost: Collection[str], alive: Mapping[str, bool] | None = None) -> frozenset[str]:
    """Nodes of which every group is lost; what a launcher knows of a node (``alive``) goes before that."""
    groups: dict[str, set[str]] = {}
    for seat in seats:
        for gpu in seat.gpus:
            groups.setdefault(gpu.rpartition("/")[0], set()).add(seat.id)
    guessed = {node for node, names in groups.items() if names <= set(lost)}
    known = alive or {}
    return frozenset(
        {node for node in guessed if not known.get(node, False)}
        | {node for node, lives in known.items() if not lives}
    )


def usable_gpus(cluster: Cluster, seats: Seats, lost: Collection[str], gone: Collection[str]) -> frozenset[str]:
    """GPUs to plan with: not on a node that is gone, and not those of a lost group on a node that lives, since
    something keeps its engine from running there."""
    stuck = {
        gpu
        for seat in seats
        if seat.id in lost and not any(gpu.rpartition("/")[0] in gone for gpu in seat.gpus)
        for gpu in seat.gpus
    }
    return frozenset(
        gpu.id for gpu in cluster.gpus if cluster.nodes[gpu.node].name not in gone and gpu.id not in stuck
    )
