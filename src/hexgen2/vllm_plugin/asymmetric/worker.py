"""What a stage's worker does differently from vLLM's: it takes its stage's TP and the layout's groups."""

from __future__ import annotations

from typing import Any

from hexgen2.vllm_plugin.asymmetric.groups import groups_of
from hexgen2.vllm_plugin.asymmetric.orphans import end_with_parent
from hexgen2.vllm_plugin.asymmetric.position import layout_of

GRACE_S = 5.0
"""A worker that outlives its engine core by this long is stuck in a collective and ends itself."""


class StageWorker:
    """Mixed in before vLLM's CPU or GPU worker class."""

    def __init__(
        self,
        vllm_config: Any,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        layout = layout_of(vllm_config)
        if layout is None:
            raise RuntimeError("a stage worker needs a layout in additional_config")
        self._layout = layout
        # Before vLLM's worker looks at it: head counts and weights follow from this number.
        vllm_config.parallel_config.tensor_parallel_size = layout.stages[layout.places[rank].stage].tp
        super().__init__(  # type: ignore[call-arg]
            vllm_config, local_rank, rank, distributed_init_method, is_driver_worker
        )
        # From here on only vLLM's arithmetic of layers (and its compile cache's path) reads this rank;
        # `self.rank` stays the true one.
        vllm_config.parallel_config.rank = layout.virtual_rank(rank)
        end_with_parent(GRACE_S)

    def init_device(self) -> None:
        with groups_of(self._layout):
            super().init_device()  # type: ignore[misc]
