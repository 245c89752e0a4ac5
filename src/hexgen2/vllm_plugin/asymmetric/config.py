"""Turn vLLM's configuration of a plain engine into that of a layout."""

from __future__ import annotations

import os
from typing import Any

from hexgen2.specs.errors import InputError
from hexgen2.vllm_plugin.asymmetric.layout import Layout
from hexgen2.vllm_plugin.asymmetric.refusals import WORKERS

PARTITION_VARIABLE = "VLLM_PP_LAYER_PARTITION"


def apply_layout(vllm_config: Any, layout: Layout) -> None:
    """Set the group's true sizes, its workers and its nodes on `vllm_config`, and the layer partition in the
    environment, which the engine's processes inherit.

    vLLM was given one stage's worth of TP: with its own arguments a world size that is no product of TP and
    PP, or nodes with a custom executor, do not pass its validation. Nothing reads these fields between the
    validation and this call. The TP stays 1 where stages differ: no single number would be right, each worker
    sets its own, and vLLM's scheduler does not use it.
    """
    parallel = vllm_config.parallel_config
    parallel.pipeline_parallel_size = len(layout.stages)
    parallel.tensor_parallel_size = layout.uniform_tp or 1
    parallel.world_size = layout.world_size
    parallel.nnodes = layout.nodes
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    os.environ[PARTITION_VARIABLE] = layout.partition
    if layout.nodes > 1:
        # Workers that wait for a message from another node do not see that their own node wants to end, and so
        # each end would take this long: 5 s as vLLM has it.
        os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "2")


def choose_devices(layout: Layout, node: int, variable: str) -> None:
    """Let this node's processes see the layout's devices, in rank order, through the platform's variable
    (`CUDA_VISIBLE_DEVICES`). Device indices count what was visible before."""
    devices = layout.node_devices(node)
    if not devices:
        return
    visible = [name for name in os.environ.get(variable, "").split(",") if name]
    if visible and max(devices) >= len(visible):
        problem = f"node {node} uses device {max(devices)}, {variable} shows {len(visible)}"
        raise InputError("--layout", "devices", problem, "count from 0 among the visible devices")
    os.environ[variable] = ",".join(visible[index] if visible else str(index) for index in devices)
