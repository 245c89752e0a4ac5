"""`HexgenConnector`: the class that vLLM loads. It only passes each call to the half that it concerns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from typing_extensions import override
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.utils.network_utils import get_ip
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from hexgen2.vllm_plugin.kv_connector.keeper import LeaseKeeper
from hexgen2.vllm_plugin.kv_connector.metadata import HexgenHandshake, HexgenMetadata
from hexgen2.vllm_plugin.kv_connector.metrics import HexgenPromMetrics, HexgenStats
from hexgen2.vllm_plugin.kv_connector.requirements import check_configuration, check_vllm
from hexgen2.vllm_plugin.kv_connector.scheduler_side import SchedulerSide
from hexgen2.vllm_plugin.kv_connector.settings import read_settings
from hexgen2.vllm_plugin.kv_connector.streams import Ready
from hexgen2.vllm_plugin.kv_connector.tables import memory_regions, model_fingerprint, worker_table
from hexgen2.vllm_plugin.kv_connector.worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class HexgenConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Moves KV caches between engines of any two layouts, by pull."""

    layout_aware = True
    """Each worker tells its own layers and heads, so stages may differ in TP (hexgen2's asymmetric layouts
    ask).
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        check_vllm()
        super().__init__(vllm_config, role, kv_cache_config)
        check_configuration(vllm_config, kv_cache_config)
        config = self._kv_transfer_config
        settings = read_settings(config.kv_connector_extra_config)
        engine = str(config.engine_id)
        model = model_fingerprint(vllm_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                engine,
                kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
                settings.lease_seconds,
                settings.begin_timeout_seconds,
                LeaseKeeper(model, settings.connect_timeout_seconds),
            )
        else:
            on_gpu = torch.cuda.is_available()
            self._worker = WorkerSide(
                engine,
                model,
                settings.host or get_ip(),
                settings,
                _device_of_this_thread(),
                _point_in_stream if on_gpu else None,
            )

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        # Heads outside tokens: a rank's part of a block is then one run of bytes for any TP on the other side.
        return None if vllm_config.model_config.use_mla else "LBHNC"

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._worker is not None
        table = worker_table(self._vllm_config, self._kv_cache_config, kv_caches)
        self._worker.start(table, memory_regions(kv_caches))

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        assert self._worker is not None
        return HexgenHandshake(self._worker.address)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        # Before the forward pass, not after it: a lease should be known, and a load under way, while the model
        # computes.
        if self._worker is not None and isinstance(connector_metadata, HexgenMetadata):
            self._worker.begin_step(connector_metadata.steps, connector_metadata.ends)
            self._worker.take(connector_metadata.leases, connector_metadata.loads)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Loads began when their orders came."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are over before their request is scheduled."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,  # noqa: ARG002  (vLLM's signature)
        attn_metadata: AttentionMetadata,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Nothing is sent: the decode side reads. It is only told that it may."""
        # With two micro-batches in turns (DBO) a layer is through when the second has been.
        if self._worker is not None and not self._vllm_config.parallel_config.use_ubatching:
            self._worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """The forward pass is over."""
        if self._worker is not None:
            self._worker.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self._worker is not None
        self._worker.abort(finished_req_ids)
        ended = self._worker.take_ended()
        return KVConnectorTransferResults(ended.sent, ended.received, ended.failed)

    def get_kv_connector_stats(self) -> HexgenStats | None:
        observed = self._worker.take_observations() if self._worker is not None else None
        return HexgenStats(observed) if observed is not None else None

    # Scheduler.

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        assert self._scheduler is not None
        shakes = [metadata[key] for key in sorted(metadata)]
        self._scheduler.set_workers(
            tuple(shake.address for shake in shakes if isinstance(shake, HexgenHandshake))
        )

    def on_new_request(self, request: Request) -> None:
        assert self._scheduler is not None
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        assert self._scheduler is not None
        self._scheduler.after_allocation(request, blocks.get_block_ids(), num_external_tokens)

    @override
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.take_orders(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        assert self._scheduler is not None
        self._scheduler.loads_ended(connector_output.finished_recving or set())

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request, block_ids)

    # Both.

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HexgenStats:
        return HexgenStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> HexgenPromMetrics:
        return HexgenPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _device_of_this_thread() -> Any:
    """What makes another thread use this thread's GPU; None on CPU."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)


def _point_in_stream() -> Ready:
    """A point in the device's work, on this thread's stream."""
    event = torch.cuda.Event()
    event.record()
    return cast("Ready", event.query)
