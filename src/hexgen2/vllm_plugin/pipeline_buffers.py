"""Allocate the buffer between pipeline stages when it is first needed.

vLLM allocates a stage's input buffer during the warm-up run. On CPU that run is skipped where nothing is
compiled (`--enforce-eager`) and the KV cache's size is given, and the first request then fails on an
assertion. With the buffer allocated on demand a pipelined CPU engine can skip compilation, which is most of
its start-up time.
"""

from __future__ import annotations

import functools
from typing import Any

from hexgen2.vllm_plugin.compat import Reliance

_RUNNER = "vllm.v1.worker.cpu_model_runner"

RELIES_ON = (
    Reliance(
        _RUNNER,
        "CPUModelRunner.sync_and_gather_intermediate_tensors",
        ("self", "num_tokens", "intermediate_tensors", "sync_self"),
    ),
)


def install() -> None:
    """Make `sync_and_gather_intermediate_tensors` of the CPU model runner allocate what it asserts to
    exist."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.sync_and_gather_intermediate_tensors

    @functools.wraps(original)
    def gather(self: Any, num_tokens: int, intermediate_tensors: Any, sync_self: bool) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, num_tokens, intermediate_tensors, sync_self)

    CPUModelRunner.sync_and_gather_intermediate_tensors = gather
