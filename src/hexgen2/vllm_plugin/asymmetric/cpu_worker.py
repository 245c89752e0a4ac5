"""The CPU worker of a stage."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from hexgen2.vllm_plugin.asymmetric.worker import StageWorker


class StageCPUWorker(StageWorker, CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker, in a stage."""
