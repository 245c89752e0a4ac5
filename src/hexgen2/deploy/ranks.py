"""How a serving group's ranks are divided into processes.

vLLM gives every process of a group the same number of ranks, in rank order, and rank order is stage order. So
a group on one node is one process; otherwise one process per node if that comes out even, else one per stage
(two processes of one group may well run on one node).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Group


@dataclass(frozen=True)
class Share:
    """The GPUs of one process: consecutive ranks of a group, all on one node."""

    node: str
    gpus: tuple[str, ...]


def node_of(gpu: str) -> str:
    """The node of a GPU called NODE/INDEX."""
    return gpu.rsplit("/", 1)[0]


def processes_of(group: Group, source: str) -> tuple[Share, ...]:
    """A group's processes in rank order; InputError where vLLM could not run it (see the module's text)."""
    by_node = _runs(group.gpus)
    if _even(by_node):
        return by_node
    by_stage = tuple(share for stage in group.stages for share in _runs(stage.gpus))
    if _even(by_stage):
        return by_stage
    parts = ", ".join(f"{len(share.gpus)} on {share.node}" for share in by_node)
    raise InputError(
        source,
        f"group {group.id}",
        f"its ranks fall unevenly over nodes ({parts}), and vLLM wants as many on each",
        "plan with tensor parallelism inside nodes",
    )


def _runs(gpus: tuple[str, ...]) -> tuple[Share, ...]:
    return tuple(Share(node, tuple(run)) for node, run in groupby(gpus, key=node_of))


def _even(shares: tuple[Share, ...]) -> bool:
    return len({len(share.gpus) for share in shares}) == 1
