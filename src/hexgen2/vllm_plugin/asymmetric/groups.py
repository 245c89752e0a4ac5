"""Make a rank's process groups from the layout, in place of vLLM's `initialize_model_parallel`.

vLLM's own function cuts one rectangle of ranks into equal rows and columns. It is replaced only while a worker
initialises its device, which is where vLLM calls it, and in that worker's process only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.distributed.parallel_state import GroupCoordinator

from hexgen2.vllm_plugin.asymmetric.layout import Layout
from hexgen2.vllm_plugin.asymmetric.pipeline_group import StagePipelineGroup


@contextlib.contextmanager
def groups_of(layout: Layout) -> Iterator[None]:
    """While this is open, vLLM makes this process's model-parallel groups from the layout."""

    def initialize_model_parallel(
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        prefill_context_model_parallel_size: int = 1,
        decode_context_model_parallel_size: int | None = 1,
        backend: str | None = None,
    ) -> None:
        world = parallel_state.get_world_group()
        stage = layout.stages[layout.places[world.rank].stage]
        expected = (stage.tp, len(layout.stages), 1, 1)
        asked = (
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            prefill_context_model_parallel_size,
            decode_context_model_parallel_size or 1,
        )
        if asked != expected:
            raise RuntimeError(
                f"vLLM asks rank {world.rank} for TP, PP, PCP, DCP of {asked}, the layout for {expected}"
            )
        _install(layout, world, backend or torch.distributed.get_backend(world.device_group))

    original = parallel_state.initialize_model_parallel
    parallel_state.initialize_model_parallel = initialize_model_parallel
    try:
        yield
    finally:
        parallel_state.initialize_model_parallel = original


def _install(layout: Layout, world: GroupCoordinator, backend: str) -> None:
    """Make the groups and publish them as vLLM's.

    The order is the same on every rank, since making a group is a collective of all ranks.
    """
    stages = [list(ranks) for ranks in layout.stage_ranks]
    alone = [[rank] for rank in range(layout.world_size)]

    def make(ranks: Sequence[list[int]], name: str, *, broadcaster: bool = False) -> GroupCoordinator:
        return parallel_state.init_model_parallel_group(
            list(ranks), world.local_rank, backend, use_message_queue_broadcaster=broadcaster, group_name=name
        )

    state: Any = parallel_state
    state._TP = make(stages, "tp", broadcaster=True)
    state._ETP = state._TP
    state._DCP = make(alone, "dcp")
    state._PCP = make(alone, "pcp")
    state._PP = StagePipelineGroup(layout, world.local_rank, backend)
    state._DP = make(alone, "dp")
    model = get_current_vllm_config().model_config
    if model is None or model.is_moe:
        state._EP = make(stages, "ep")
    if layout.nodes > 1:
        state._INNER_DP_WORLD = NodeWorld(layout, world)


class NodeWorld:
    """The group through which workers set up their message queues to the leader, for nodes of unlike size.

    vLLM's own derives a rank's node from equal numbers of devices per node.
    """

    def __init__(self, layout: Layout, world: GroupCoordinator) -> None:
        self._layout = layout
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def create_single_reader_mq_broadcasters(
        self, reader_rank_in_group: int = 0, blocking: bool = False
    ) -> tuple[MessageQueue, list[Any]]:
        """This rank's queue to the reader's node, and on the reader the handles of all ranks' queues."""
        places = self._layout.places
        near = places[self._world.rank].node == places[reader_rank_in_group].node
        queue = MessageQueue(1, int(near), max_chunk_bytes=1 << 22, max_chunks=6)
        reads = self._world.rank == reader_rank_in_group
        handles: list[Any] | None = [None] * self._layout.world_size if reads else None
        torch.distributed.gather_object(
            queue.export_handle(), handles, dst=reader_rank_in_group, group=self._world.cpu_group
        )
        if blocking:
            queue.wait_until_ready()
        return queue, handles or []
