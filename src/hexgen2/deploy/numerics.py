"""What all engines of a plan must agree on for one to continue from another's KV cache.

Left to itself vLLM picks the attention backend, the KV block size and the data types by the GPU it finds, and
two engines that picked differently refuse each other's caches (or, with a difference in dtype, would misread
them). So they are chosen once, for the weakest device of the plan, and pinned everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from hexgen2.deploy.options import EngineOptions
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GpuType
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan

WITHOUT_FLASH_ATTENTION = {"volta", "turing"}
"""NVIDIA generations below compute capability 8.0, which FlashAttention needs."""

GPU_BLOCK_SIZE = 16
CPU_BLOCK_SIZE = 32
"""vLLM's CPU attention works on multiples of 32 tokens."""

CPU_MLA_BLOCK_SIZE = 16
"""The only one that vLLM's CPU kernel for MLA is compiled for."""


@dataclass(frozen=True)
class Numerics:
    """The pinned values, as vLLM's arguments spell them."""

    vendor: str
    dtype: str
    kv_cache_dtype: str
    attention_backend: str
    block_size: int

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            *("--dtype", self.dtype),
            *("--kv-cache-dtype", self.kv_cache_dtype),
            *("--attention-backend", self.attention_backend),
            *("--block-size", str(self.block_size)),
        )


def used_types(plan: Plan) -> tuple[GpuType, ...]:
    """The device types that a plan uses, each once, by name."""
    found = {plan.cluster.gpu_by_id[gpu].type for group in plan.groups for gpu in group.gpus}
    return tuple(sorted(found, key=lambda kind: kind.name))


def agree(plan: Plan, model: Model, options: EngineOptions, source: str) -> Numerics:
    """One choice for all engines of the plan; InputError where its devices cannot agree."""
    types = used_types(plan)
    vendors = sorted({kind.vendor for kind in types})
    if len(vendors) > 1:
        raise InputError(
            source,
            "groups",
            f"the plan mixes devices of {' and '.join(vendors)}, whose engines cannot share KV caches",
            "plan for the nodes of one vendor",
        )
    vendor = vendors[0]
    mla = model.mla is not None
    if vendor == "cpu":
        dtype = "float32"
        backend = "CPU_MLA" if mla else "CPU_ATTN"
        block_size = CPU_MLA_BLOCK_SIZE if mla else CPU_BLOCK_SIZE
    else:
        # FP16-only tensor cores (V100, T4) cannot run bfloat16; then nobody does.
        dtype = "half" if any(kind.dense_dtype == "fp16" for kind in types) else "bfloat16"
        old = any(kind.generation in WITHOUT_FLASH_ATTENTION for kind in types)
        # The Triton backends run on everything that vLLM does.
        fallback = "TRITON_MLA" if mla else "TRITON_ATTN"
        backend = "FLASH_ATTN" if vendor == "nvidia" and not old and not mla else fallback
        block_size = GPU_BLOCK_SIZE
    return Numerics(
        vendor=vendor,
        dtype=options.dtype or dtype,
        kv_cache_dtype=options.kv_cache_dtype or ("fp8" if model.kv_bytes == 1 else "auto"),
        attention_backend=options.attention_backend or backend,
        block_size=options.block_size or block_size,
    )
