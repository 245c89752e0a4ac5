"""The GPU worker of a stage (CUDA and ROCm)."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from hexgen2.vllm_plugin.asymmetric.worker import StageWorker


class StageGPUWorker(StageWorker, Worker):  # type: ignore[misc]
    """vLLM's GPU worker, in a stage."""
