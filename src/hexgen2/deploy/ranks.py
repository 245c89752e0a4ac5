"""How a serving group's ranks are divided into processes.

vLLM gives every process of a group the same number of ranks, in rank order, and rank order is stage order. So
a group on one node is one process; otherwise one process per node if that comes out even, else one per stage
(two processes of one group may well run on one node). Groups that vLLM cannot run so, with stages of unlike
TP or unevenly spread over nodes, run on our asymmetric executor: one process per node, whatever ranks it has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby

from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Group


@dataclass(frozen=True)
class Share:
    """The GPUs of one process, all on one node, in the order of its ranks."""

    node: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Division:
    """A group's processes in rank order.

    ``layout`` is what `hexgen2.vllm_plugin.asymmetric.server` executes, as JSON; None for vLLM's own executors.
    """

    shares: tuple[Share, ...]
    layout: str | None = None


def node_of(gpu: str) -> str:
    """The node of a GPU called NODE/INDEX."""
    return gpu.rsplit("/", 1)[0]


def divide(group: Group, source: str) -> Division:
    """How a group runs; InputError where nothing could run it (see the module's text)."""
    uniform = len({stage.tp for stage in group.stages}) == 1
    even = next(filter(_even, (_runs(group.gpus), _by_stage(group))), None)
    if uniform and even is not None:
        return Division(even)
    if len(_by_stage(group)) > len(group.stages):
        across = next(stage for stage in group.stages if len(_runs(stage.gpus)) > 1)
        parts = ", ".join(f"{len(share.gpus)} on {share.node}" for share in _runs(across.gpus))
        raise InputError(
            source,
            f"group {group.id}",
            f"a stage of TP {across.tp} lies unevenly over nodes ({parts}), which no engine can run",
            "plan with tensor parallelism inside nodes",
        )
    return _division_by_layout(group)


def _division_by_layout(group: Group) -> Division:
    """One process per node; the node of the first stage leads."""
    nodes = list(dict.fromkeys(node_of(stage.gpus[0]) for stage in group.stages))
    stages = [
        {
            "tp": stage.tp,
            "first_layer": stage.first_layer,
            "layers": stage.layers,
            "node": nodes.index(node_of(stage.gpus[0])),
        }
        for stage in group.stages
    ]
    shares = tuple(Share(node, tuple(gpu for gpu in group.gpus if node_of(gpu) == node)) for node in nodes)
    return Division(shares, json.dumps({"stages": stages}))


def _by_stage(group: Group) -> tuple[Share, ...]:
    return tuple(share for stage in group.stages for share in _runs(stage.gpus))


def _runs(gpus: tuple[str, ...]) -> tuple[Share, ...]:
    return tuple(Share(node, tuple(run)) for node, run in groupby(gpus, key=node_of))


def _even(shares: tuple[Share, ...]) -> bool:
    return len({len(share.gpus) for share in shares}) == 1
