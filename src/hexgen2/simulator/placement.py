"""Where a plan's groups sit in its cluster."""

from __future__ import annotations

from hexgen2.cost.layout import PlacedStage, Placement
from hexgen2.specs.plan import Group, Plan


def placement(plan: Plan, group: Group) -> Placement:
    """A group's stages by the cluster's GPU indices."""
    gpus = plan.cluster.gpu_by_id
    return tuple(
        PlacedStage(tuple(gpus[gpu].index for gpu in stage.gpus), stage.first_layer, stage.layers)
        for stage in group.stages
    )
