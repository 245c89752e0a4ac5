"""The argument vector and the environment of one vLLM process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hexgen2.deploy.cpu_memory import cpu_cache
from hexgen2.deploy.kv_transfer import Transfer
from hexgen2.deploy.numerics import Numerics
from hexgen2.deploy.options import EngineOptions
from hexgen2.deploy.ranks import Share
from hexgen2.deploy.site import Address
from hexgen2.deploy.spec import KV_TRANSFER_FLAG
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Group, Plan

SERVER = "vllm.entrypoints.openai.api_server"
HEADLESS = "hexgen2.vllm_plugin.headless"
LAYOUT_SERVER = "hexgen2.vllm_plugin.asymmetric.server"
UNI_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Given as a class, since vLLM's CPU platform turns the short name `uni` into `mp`."""

VISIBLE_DEVICES = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "HIP_VISIBLE_DEVICES"}

UNSET = (
    "VLLM_CPU_KVCACHE_SPACE",  # would override --kv-cache-memory-bytes
    "VLLM_PP_LAYER_PARTITION",  # set below for groups that need it, and wrong for every other
    "VLLM_PORT",  # would make engines of one machine count up from the same port
    "VLLM_DP_RANK",
    "VLLM_DP_SIZE",
    "VLLM_API_KEY",  # would make engines ask the coordinator for a key, and every request end in 401
)
"""Variables of the user's shell that would bend the engines away from the plan."""


@dataclass(frozen=True)
class EngineContext:
    """What the processes of one deployment have in common."""

    plan: Plan
    model: Model
    served_names: tuple[str, ...]
    numerics: Numerics
    transfer: Transfer | None
    options: EngineOptions
    source: str


@dataclass(frozen=True)
class Seat:
    """Where one process of a group sits: its rank among the group's processes, its devices, addresses and
    ports. ``layout``: what the group executes where vLLM's own executors cannot, as JSON."""

    share: Share
    rank: int
    node_rank: str
    count: int
    layout: str | None
    address: Address
    head: Address
    devices: tuple[int, ...]
    http_port: int
    master_port: int | None
    side_channel_port: int | None


def arguments(context: EngineContext, group: Group, seat: Seat) -> tuple[str, ...]:
    """The argument vector of one process of a group."""
    options = context.options
    budget = min(options.token_budget, group.token_budget or options.token_budget)
    return (
        options.python,
        *_program(group, seat),
        *("--model", context.model.location),
        *("--served-model-name", *context.served_names),
        *(("--host", seat.address.listen, "--port", str(seat.http_port)) if seat.rank == 0 else ()),
        *_spanning(seat),
        *context.numerics.arguments,
        *("--max-num-seqs", str(group.max_batch)),
        *("--max-num-batched-tokens", str(max(budget, group.max_batch))),
        *_memory(context, group),
        *_transfer(context, group, seat),
        "--disable-uvicorn-access-log",
        *options.extra_arguments,
    )


def environment(context: EngineContext, group: Group, seat: Seat) -> dict[str, str]:
    """The variables that a process needs beyond those of its launcher."""
    vendor = context.numerics.vendor
    env = {
        "VLLM_HOST_IP": seat.address.own,
        "VLLM_NO_USAGE_STATS": "1",
        "HEXGEN2_VLLM_TUNING": "cpu" if vendor == "cpu" else "parent-death,ucx-settings",
    }
    if Path(context.model.location).is_absolute():
        env["HF_HUB_OFFLINE"] = "1"  # the model is a directory: nothing may wait for a hub
    if vendor in VISIBLE_DEVICES:
        env[VISIBLE_DEVICES[vendor]] = ",".join(str(device) for device in seat.devices)
    if vendor == "nvidia":
        # CUDA's own order puts the fastest first, which on a host of unlike GPUs is not the cluster file's.
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if vendor == "cpu":
        env |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # With TP vLLM compiles a helper of its embedding even in eager mode: 6 s of the first request.
            "TORCH_COMPILE_DISABLE": "1",
        }
    if len(group.stages) > 1 and seat.layout is None:
        env["VLLM_PP_LAYER_PARTITION"] = ",".join(str(stage.layers) for stage in group.stages)
    if seat.side_channel_port is not None:
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = seat.head.own if seat.rank == 0 else seat.head.reach
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(seat.side_channel_port)
    return env


def _program(group: Group, seat: Seat) -> Sequence[str]:
    """The module that the process runs, and how the group's ranks are laid out."""
    if seat.layout is not None:
        return ("-m", LAYOUT_SERVER, "--layout", seat.layout)
    sizes = (
        "--tensor-parallel-size",
        str(group.stages[0].tp),
        "--pipeline-parallel-size",
        str(len(group.stages)),
    )
    return ("-m", SERVER, *sizes) if seat.rank == 0 else ("-m", HEADLESS, "--headless", *sizes)


def _spanning(seat: Seat) -> Sequence[str]:
    """How the processes of a group that is more than one find each other."""
    if seat.count == 1:
        return ()
    return (
        *(("--nnodes", str(seat.count)) if seat.layout is None else ()),
        *("--node-rank", seat.node_rank),
        *("--master-addr", seat.head.reach),
        *("--master-port", str(seat.master_port)),
    )


def _memory(context: EngineContext, group: Group) -> Sequence[str]:
    """How much of its device an engine takes, and the longest request it accepts."""
    options = context.options
    if context.numerics.vendor != "cpu":
        return (
            *("--gpu-memory-utilization", str(options.memory_utilisation)),
            # `auto`: the model's own limit, or what fits beside the weights where that is less.
            *("--max-model-len", str(options.max_model_len or "auto")),
        )
    cache = cpu_cache(group, context.plan.cluster, context.model, context.numerics, options, context.source)
    alone = len(group.gpus) == 1
    return (
        *("--kv-cache-memory-bytes", str(cache.kv_bytes)),
        *("--max-model-len", str(cache.max_model_len)),
        # Eager with a given cache size skips the warm-up; one rank needs no worker process.
        "--enforce-eager",
        *(("--distributed-executor-backend", UNI_EXECUTOR) if alone else ()),
    )


def _transfer(context: EngineContext, group: Group, seat: Seat) -> Sequence[str]:
    """The KV connector of a prefill or decode group; a colocated one has none."""
    if context.transfer is None or group.role == "colocated":
        return ()
    return (KV_TRANSFER_FLAG, context.transfer.config(group.id, group.role, context.options, seat.count))
