"""What a layout cannot be combined with, checked before any process of the engine starts.

A combination is refused where its code in vLLM assumes one TP for all stages, or where nobody has tried it
with stages of unlike TP. docs/runtime.md lists them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hexgen2.specs.errors import InputError
from hexgen2.vllm_plugin.asymmetric.layout import Layout

WORKERS: Mapping[str, str] = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "hexgen2.vllm_plugin.asymmetric.cpu_worker.StageCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "hexgen2.vllm_plugin.asymmetric.gpu_worker.StageGPUWorker",
}
"""vLLM's worker classes that have a counterpart for stages."""

SHARDED_FORMATS = ("sharded_state", "tensorizer", "runai_streamer_sharded")
SOURCE = "layout"
_LEAVE_OUT = "leave it out"


@dataclass(frozen=True)
class Rule:
    """One refusal: vLLM's option, when it is refused, why, and how to mend it."""

    option: str
    applies: Callable[[Any], bool]
    problem: str
    mend: str = _LEAVE_OUT


def _parallel(name: str) -> Callable[[Any], bool]:
    """Whether a switch of the parallel configuration is on."""
    return lambda config: bool(getattr(config.parallel_config, name))


def _parallel_size(name: str) -> Callable[[Any], bool]:
    """Whether a size of the parallel configuration is above 1."""
    return lambda config: int(getattr(config.parallel_config, name)) > 1


def _given(name: str) -> Callable[[Any], bool]:
    """Whether a whole part of the configuration was given."""
    return lambda config: getattr(config, name) is not None


RULES = (
    Rule(
        "--data-parallel-size",
        _parallel_size("data_parallel_size"),
        "is above 1",
        "start one engine per replica",
    ),
    Rule(
        "--prefill-context-parallel-size",
        _parallel_size("prefill_context_parallel_size"),
        "divides stages into equal groups",
    ),
    Rule(
        "--decode-context-parallel-size",
        _parallel_size("decode_context_parallel_size"),
        "divides stages into equal groups",
    ),
    Rule("--enable-eplb", _parallel("enable_eplb"), "moves experts over equal groups"),
    Rule("--enable-elastic-ep", _parallel("enable_elastic_ep"), "changes the number of ranks"),
    Rule("--enable-dbo", _parallel("use_ubatching"), "is not for pipelines"),
    Rule("--enable-hc-sp", _parallel("enable_hc_sp"), "splits hidden states over the TP ranks"),
    Rule("--enable-fault-tolerance", _parallel("enable_fault_tolerance"), "is for data parallelism"),
    Rule(
        "--device-ids",
        lambda config: config.parallel_config.assigned_physical_gpu_ids is not None,
        "competes with the layout",
        "name the devices in the layout",
    ),
    Rule(
        "--worker-cls",
        lambda config: config.parallel_config.worker_cls not in WORKERS,
        "is not vLLM's CPU or GPU worker",
        "leave it out, and run on CPU, CUDA or ROCm",
    ),
    Rule("--speculative-config", _given("speculative_config"), "is not supported with a layout"),
    Rule("--enable-lora", _given("lora_config"), "is not supported with a layout"),
    Rule("--weight-transfer-config", _given("weight_transfer_config"), "numbers ranks by one TP"),
    Rule("--ec-transfer-config", _given("ec_transfer_config"), "is not supported with a layout"),
    Rule(
        "--load-format",
        lambda config: config.load_config.load_format in SHARDED_FORMATS,
        "holds the shards of one TP",
        "use the ordinary weights",
    ),
)
"""Refused with any layout, in the order of checking."""


def check_config(vllm_config: Any, layout: Layout) -> None:
    """Raise InputError with the first thing that keeps an engine from running as the layout.

    `vllm_config` is vLLM's own configuration with a TP of 1, before `apply_layout`.
    """
    for rule in RULES:
        if rule.applies(vllm_config):
            raise InputError(SOURCE, rule.option, rule.problem, rule.mend)
    _check_model(vllm_config.model_config, layout)
    for index in range(len(layout.stages)):
        _check_heads(vllm_config, layout, index)
    _check_runner(vllm_config, layout)
    _check_environment(vllm_config, layout)
    _check_connector(vllm_config, layout)


def _check_model(model: Any, layout: Layout) -> None:
    total = model.get_total_num_hidden_layers()
    if layout.layers != total:
        problem = f"hold {layout.layers} layers, {model.model} has {total}"
        raise InputError(SOURCE, "stages", problem, "let the layers sum to the model's")
    if model.runner_type != "generate":
        raise InputError(SOURCE, "model", f"runs as {model.runner_type}", "use a generating model")
    if model.is_encoder_decoder:
        raise InputError(SOURCE, "model", "is an encoder-decoder", "use a decoder-only model")
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    if layout.uniform_tp is None and (model.is_hybrid or len(kinds) > 1):
        # vLLM groups layers by the bytes of their KV pages. Unlike TPs split one kind of layer into several
        # groups, and its arithmetic of hybrid groups was not made for that.
        raise InputError(SOURCE, "model", "mixes kinds of attention layers", "give all stages one TP")


def _check_heads(vllm_config: Any, layout: Layout, index: int) -> None:
    """What vLLM checks of its one TP, for the TP of one stage."""
    field, tp, model = f"stages[{index}].tp", layout.stages[index].tp, vllm_config.model_config
    parallel = copy.copy(vllm_config.parallel_config)
    parallel.tensor_parallel_size = tp
    try:
        model.verify_with_parallel_config(parallel)
    except (ValueError, NotImplementedError) as error:
        raise InputError(SOURCE, field, str(error).rstrip("."), "choose another TP") from None
    heads = 1 if model.use_mla else model.get_total_num_kv_heads()
    if heads % tp and tp % heads:
        problem = f"{tp} neither divides the {heads} KV heads nor is a multiple of them"
        raise InputError(SOURCE, field, problem, "choose another TP")


def _check_runner(vllm_config: Any, layout: Layout) -> None:
    """Pipelines run on the V1 model runner without async scheduling, and on GPUs on the V2 runner with or
    without it."""
    if len(layout.stages) == 1:
        return
    if vllm_config.use_v2_model_runner and vllm_config.device_config.device_type == "cpu":
        raise InputError(SOURCE, "VLLM_USE_V2_MODEL_RUNNER", "runs no pipelines on CPU", "set it to 0")
    if vllm_config.scheduler_config.async_scheduling and not vllm_config.use_v2_model_runner:
        problem = "needs the V2 model runner where there are several stages"
        raise InputError(SOURCE, "--async-scheduling", problem, "add --no-async-scheduling")


def _check_environment(vllm_config: Any, layout: Layout) -> None:
    if os.environ.get("VLLM_DISTRIBUTED_USE_SPLIT_GROUP", "0").lower() not in ("", "0", "false"):
        raise InputError(SOURCE, "VLLM_DISTRIBUTED_USE_SPLIT_GROUP", "wants equal groups", "unset it")
    if os.environ.get("VLLM_PP_LAYER_PARTITION", layout.partition) != layout.partition:
        raise InputError(SOURCE, "VLLM_PP_LAYER_PARTITION", "contradicts the layout", "unset it")
    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if vllm_config.device_config.device_type == "cpu" and layout.nodes > 1 and binding != "nobind":
        # vLLM divides a node's cores by an equal number of ranks per node.
        problem = "binds threads of a group on several nodes"
        raise InputError(SOURCE, "VLLM_CPU_OMP_THREADS_BIND", problem, "set it to nobind")


def _check_connector(vllm_config: Any, layout: Layout) -> None:
    """With equal TPs the groups are vLLM's own, and so any of its connectors sees what it knows."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None or layout.uniform_tp is not None:
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    connector = KVConnectorFactory.get_connector_class(transfer)
    if not getattr(connector, "layout_aware", False):
        problem = f"{transfer.kv_connector} takes one TP for that of all stages"
        mend = "use a connector whose class has layout_aware = True, or give all stages one TP"
        raise InputError(SOURCE, "--kv-transfer-config", problem, mend)
