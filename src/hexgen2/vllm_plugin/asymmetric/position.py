"""Where this process stands in its group, for code that must know: above all KV connectors.

Works in an engine with a layout and in a plain vLLM engine. Imports nothing of vLLM until asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hexgen2.vllm_plugin.asymmetric.layout import LAYOUT_KEY, Layout


@dataclass(frozen=True)
class Position:
    """A worker's place: its pipeline stage, the TP inside it, and the size of the group.

    `(stage, tp_rank)` is the key under which vLLM collects connector handshakes. `world_size` is the number of
    workers that report to the scheduler, whatever their TP.
    """

    rank: int
    stage: int
    stages: int
    tp_rank: int
    tp: int
    world_size: int


def layout_of(vllm_config: Any) -> Layout | None:
    """The layout that an engine runs with; None for a plain vLLM engine. In any of the engine's processes."""
    additional = vllm_config.additional_config
    document = additional.get(LAYOUT_KEY) if isinstance(additional, dict) else None
    return None if document is None else Layout.read(document, f"additional_config.{LAYOUT_KEY}")


def worker_position() -> Position:
    """This worker's place, from vLLM's groups; only in a worker, once its device is initialised."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group

    world, pipeline, tensor = get_world_group(), get_pp_group(), get_tp_group()
    return Position(
        rank=world.rank,
        stage=pipeline.rank_in_group,
        stages=pipeline.world_size,
        tp_rank=tensor.rank_in_group,
        tp=tensor.world_size,
        world_size=world.world_size,
    )
