"""Run the workers of a layout: vLLM's multiprocess executor with the layout's ranks and nodes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from typing import Any

import vllm
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

from hexgen2.vllm_plugin.asymmetric.layout import Layout
from hexgen2.vllm_plugin.asymmetric.lifeline import FollowerLifeline, LeaderLifeline, Lifeline
from hexgen2.vllm_plugin.asymmetric.orphans import end_after, end_with_parent
from hexgen2.vllm_plugin.asymmetric.position import layout_of
from hexgen2.vllm_plugin.asymmetric.reliance import require_vllm

ENGINE_GRACE_S = 15.0
"""How long an engine core whose API server was killed may take to end its workers."""

FAILED_GRACE_S = 1.0
"""How long an engine core whose workers have ended may take to end by itself."""

logger = logging.getLogger("vllm.hexgen2")


class AsymmetricExecutor(MultiprocExecutor):  # type: ignore[misc]
    """vLLM builds it in the engine core of the leader; a follower's main process builds its own."""

    supports_pp = True

    def __init__(self, vllm_config: Any, monitor_workers: bool = True) -> None:
        require_vllm()
        layout = layout_of(vllm_config)
        if layout is None:
            raise RuntimeError("AsymmetricExecutor needs a layout in additional_config")
        self.layout: Layout = layout
        self.node: int = vllm_config.parallel_config.node_rank
        self.lifeline: Lifeline | None = None
        if multiprocessing.parent_process() is not None:
            # A forked engine core holds the API server's signal pipe: a SIGTERM to it or to a worker would then
            # stop the API server in order, where it should notice that its engine is dead.
            signal.set_wakeup_fd(-1)
            end_with_parent(ENGINE_GRACE_S)
        super().__init__(vllm_config, monitor_workers)

    def _init_executor(self) -> None:
        if self.layout.nodes > 1:
            self.lifeline = self._join()
        try:
            with _ranks_from(self._offset):
                super()._init_executor()
        except BaseException:
            self._leave(orderly=False)
            raise

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        if self.layout.uniform_tp is None and any(
            len(config.kv_cache_groups) > 1 for config in kv_cache_configs
        ):
            raise ValueError(
                "hexgen2: this model's KV cache falls into several groups, which stages of unlike TP "
                "cannot run; give all stages one TP"
            )
        super().initialize_from_config(kv_cache_configs)

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """Besides the news to the engine, an end for it.

        The engine's thread may be waiting for the answer of a rank on another node, which no shutdown of queues
        interrupts. Its process then ends itself, and vLLM's API server fails the requests and ends as it does
        whenever an engine dies.
        """

        def failed() -> None:
            callback()
            end_after(FAILED_GRACE_S)

        super().register_failure_callback(failed)

    def shutdown(self) -> None:
        self._leave(orderly=not getattr(self, "is_failed", False))
        super().shutdown()

    def _get_parallel_sizes(self) -> tuple[int, int, int]:
        self.world_size = self.layout.world_size
        self.local_world_size = len(self._own_ranks)
        # The base class only checks that the product is the world size, which no TP times PP need be here.
        return self.world_size, 1, 1

    def _is_driver_worker(self, rank: int) -> bool:
        return self.layout.places[rank + self._offset].tp_rank == 0

    def _get_output_rank(self) -> int:
        return self.layout.output_rank

    @property
    def _own_ranks(self) -> range:
        return self.layout.node_ranks(self.node)

    @property
    def _offset(self) -> int:
        """What to add to a rank that the base class computes as if all nodes had as many as this one."""
        return self._own_ranks.start - len(self._own_ranks) * self.node

    def _join(self) -> Lifeline:
        parallel = self.parallel_config
        address = (parallel.master_addr, parallel.master_port + 1)
        if self.node == 0:
            return LeaderLifeline(address, self.layout.nodes, self._digest(), self._lost)
        return FollowerLifeline(address, self.node, self._digest(), self._lost)

    def _digest(self) -> str:
        """What the nodes of one group must agree on. Not the model's path, which may differ by node."""
        config = self.model_config
        stages = [[stage.tp, stage.first_layer, stage.layers, stage.node] for stage in self.layout.stages]
        agreed = [stages, vllm.__version__, str(config.dtype), config.max_model_len, config.architectures]
        return hashlib.sha256(json.dumps(agreed).encode()).hexdigest()

    def _lost(self, reason: str) -> None:
        """Another node is gone (called from the lifeline's thread): end this node's part of the group."""
        log = logger.info if self.lifeline is not None and self.lifeline.orderly else logger.error
        log("hexgen2: node %d ends its part of the group, since %s", self.node, reason)
        self.is_failed = True
        if not hasattr(self, "workers"):
            # Still starting: the thread that starts sees its workers die, and cleans up.
            for process in multiprocessing.active_children():
                process.terminate()
            return
        self.shutdown()
        callback = getattr(self, "failure_callback", None)
        self.failure_callback = None
        if callback is not None:
            callback()
        elif self.node == 0:  # still starting; a follower's main thread waits for its workers only, and ends
            end_after(FAILED_GRACE_S)

    def _leave(self, *, orderly: bool) -> None:
        lifeline = getattr(self, "lifeline", None)
        if lifeline is not None:
            lifeline.close(orderly=orderly)


@contextlib.contextmanager
def _ranks_from(offset: int) -> Iterator[None]:
    """While this is open, workers are made with `offset` added to their rank."""
    if offset == 0:
        yield
        return
    original = WorkerProc.make_worker_process

    def make_worker_process(*, rank: int, **arguments: Any) -> Any:
        return original(rank=rank + offset, **arguments)

    WorkerProc.make_worker_process = staticmethod(make_worker_process)
    try:
        yield
    finally:
        WorkerProc.make_worker_process = staticmethod(original)
