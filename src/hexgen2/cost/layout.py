"""A layout as the cost model sees it: stages without names of GPUs, so that equal ones share a result."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen2.specs.cluster import Cluster
from hexgen2.specs.gpu import GpuType, Link, weakest


@dataclass(frozen=True, slots=True)
class StageShape:
    """A pipeline stage of ``tp`` GPUs that behave like ``gpu`` (`hexgen2.specs.gpu.weakest` of its members).

    ``link`` is the slowest link inside the TP group (None with one GPU), ``upstream`` the slowest link by which
    the stage receives hidden states from the stage before it (None for the first stage).
    """

    gpu: GpuType
    tp: int
    layers: int
    link: Link | None = None
    upstream: Link | None = None


Layout = tuple[StageShape, ...]
"""The ordered stages of a serving group; their layers sum to the model's."""


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """Which GPUs of the cluster (by index, in rank order) hold which run of layers."""

    gpus: tuple[int, ...]
    first_layer: int
    layers: int


Placement = tuple[PlacedStage, ...]
"""A layout on real GPUs."""


def shape(cluster: Cluster, placement: Placement) -> Layout:
    """The layout of a placement: each stage's weakest GPU type and slowest links.

    Receiving rank j of a stage reads from rank j mod tp of the stage before it (what our engine plugin and, for
    equal TP, vLLM itself do), so only those links count as ``upstream``.
    """
    stages: list[StageShape] = []
    before: tuple[int, ...] = ()
    for stage in placement:
        gpus = stage.gpus
        inside = [(a, b) for place, a in enumerate(gpus) for b in gpus[:place]]
        across = [(before[rank % len(before)], gpu) for rank, gpu in enumerate(gpus)] if before else []
        stages.append(
            StageShape(
                gpu=weakest([cluster.gpus[gpu].type for gpu in gpus]),
                tp=len(gpus),
                layers=stage.layers,
                link=_slowest(cluster, inside),
                upstream=_slowest(cluster, across),
            )
        )
        before = gpus
    return tuple(stages)


def _slowest(cluster: Cluster, pairs: list[tuple[int, int]]) -> Link | None:
    """The least bandwidth and the greatest latency among the links of these pairs; None without pairs."""
    if not pairs:
        return None
    return Link(
        bandwidth=min(float(cluster.bandwidth[pair]) for pair in pairs),
        latency=max(float(cluster.latency[pair]) for pair in pairs),
    )
