"""What the transfers took: for vLLM's log line and for Prometheus, by peer.

The same figures as vLLM's NIXL connector (seconds, seconds to post, bytes, descriptors, failures, expired
leases), with one label more: `peer`, the name of the engine at the other end. They are counted where they
happen: transfers and their failures on the decode side, expired leases on the prefill side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from hexgen2.vllm_plugin.kv_connector.observations import (
    EXPIRED,
    FAILED,
    TRANSFERS,
    Observations,
    add,
    is_empty,
    no_observations,
)


class HexgenStats(KVConnectorStats):  # type: ignore[misc]
    """Observations since the last look."""

    def __init__(self, data: Observations | None = None) -> None:
        super().__init__()
        self.data: Observations = data or no_observations()

    def reset(self) -> None:
        self.data = no_observations()

    def is_empty(self) -> bool:
        return is_empty(self.data)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        rows = np.array([row[1:] for row in self.data[TRANSFERS]], dtype=float).reshape(-1, 4)
        seconds, sizes = rows[:, 0], rows[:, 2]
        return {
            "Num successful transfers": len(rows),
            "Avg xfer time (ms)": round(float(seconds.mean()) * 1e3, 3) if len(rows) else 0,
            "P90 xfer time (ms)": round(float(np.percentile(seconds, 90)) * 1e3, 3) if len(rows) else 0,
            "Avg MB per transfer": round(float(sizes.mean()) / 2**20, 3) if len(rows) else 0,
            "Throughput (MB/s)": round(float(sizes.sum() / seconds.sum()) / 2**20, 1) if len(rows) else 0,
            "Num failed transfers": len(self.data[FAILED]),
            "Num expired leases": self.data[EXPIRED],
        }


class HexgenPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Prometheus metrics; their names start with `vllm:hexgen_kv_`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        by_peer = [*labelnames, "peer"]
        self._seconds = self._histogram_cls(
            name="vllm:hexgen_kv_transfer_seconds",
            documentation="Seconds of one worker's KV transfer from one peer.",
            buckets=[0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 60.0],
            labelnames=by_peer,
        )
        self._post_seconds = self._histogram_cls(
            name="vllm:hexgen_kv_post_seconds",
            documentation="Seconds spent posting one KV transfer.",
            buckets=[0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0],
            labelnames=by_peer,
        )
        self._sizes = self._histogram_cls(
            name="vllm:hexgen_kv_transfer_bytes",
            documentation="Bytes of one worker's KV transfer from one peer.",
            buckets=[float(2**power) for power in range(12, 36, 2)],
            labelnames=by_peer,
        )
        self._descriptors = self._histogram_cls(
            name="vllm:hexgen_kv_descriptors",
            documentation="Descriptors of one KV transfer.",
            buckets=[1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192, 32768],
            labelnames=by_peer,
        )
        self._failures = self._counter_cls(
            name="vllm:hexgen_kv_failed_transfers",
            documentation="KV transfers that failed; the request was recomputed or failed, as configured.",
            labelnames=by_peer,
        )
        self._expired = self._counter_cls(
            name="vllm:hexgen_kv_expired_leases",
            documentation="Prefills whose KV nobody fetched in time, counted once a worker.",
            labelnames=labelnames,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for peer, seconds, post_s, size, descriptors in transfer_stats_data[TRANSFERS]:
            self._seconds.labels(*values, peer).observe(seconds)
            self._post_seconds.labels(*values, peer).observe(post_s)
            self._sizes.labels(*values, peer).observe(size)
            self._descriptors.labels(*values, peer).observe(descriptors)
        for peer in transfer_stats_data[FAILED]:
            self._failures.labels(*values, peer).inc()
        if transfer_stats_data[EXPIRED]:
            self._expired.labels(*values).inc(transfer_stats_data[EXPIRED])
