"""From vLLM's tensors and configuration to a worker's table: the one place that knows how vLLM lays out its KV
cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.distributed.parallel_state import get_tp_group, get_world_group
from vllm.v1.kv_cache_interface import MLAAttentionSpec, UniformTypeKVCacheSpecs

from hexgen2.vllm_plugin.kv_connector.shards import LayerShard, Slab, WorkerTable, head_interval

ROW_BACKENDS = frozenset({"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"})
"""GPU backends whose blocks are token by token, and can be cut anywhere. MLA backends are so too, by the name
below.
"""


def model_fingerprint(vllm_config: Any) -> str:
    """What two engines must share for one's KV to mean the same to the other: shapes, types and the engine's
    version.

    The weights are not looked at: two engines of one plan are started with the same model.
    """
    from vllm import __version__

    model, cache = vllm_config.model_config, vllm_config.cache_config
    facts = {
        "architectures": list(getattr(model.hf_config, "architectures", None) or []),
        "layers": model.hf_text_config.num_hidden_layers,
        "hidden": model.get_hidden_size(),
        "kv_heads": model.get_total_num_kv_heads(),
        "head": model.get_head_size(),
        "vocabulary": model.get_vocab_size(),
        "dtype": str(model.dtype),
        "cache": str(cache.cache_dtype),
        "vllm": __version__.split("+")[0],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return f"{(facts['architectures'] or ['model'])[0]}-{facts['dtype'].removeprefix('torch.')}-{digest}"


def worker_table(vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor]) -> WorkerTable:
    """The table of this worker, from the tensors that vLLM registers. Raises ValueError for a cache it cannot
    describe.
    """
    group = kv_cache_config.transfer_groups[0]
    names = [name for name in kv_caches if name in set(group.layer_names)]
    if not names:
        raise ValueError("this worker holds no layer with a KV cache of its own")
    specs = group.kv_cache_spec
    backends = sorted({backend.get_name() for backend in get_current_attn_backends(vllm_config, names)})
    kinds = {_slab(vllm_config, name, backends) for name in names}
    if len(kinds) > 1 or len(backends) > 1:
        raise ValueError(f"layers with unlike attention kernels ({', '.join(backends)}) are not supported")
    slab, isa = kinds.pop()
    tp = get_tp_group()
    layers = []
    for name in names:
        spec = specs.kv_cache_specs[name] if isinstance(specs, UniformTypeKVCacheSpecs) else specs
        mla = isinstance(spec, MLAAttentionSpec)
        total = 1 if mla else vllm_config.model_config.get_total_num_kv_heads()
        first, heads = (0, 1) if mla else head_interval(total, tp.world_size, tp.rank_in_group)
        layers.append(_shard(name, kv_caches[name], first, heads, total, slab))
    tensor = kv_caches[names[0]]
    on_cpu = tensor.device.type == "cpu"
    return WorkerTable(
        rank=get_world_group().rank_in_group,
        memory="DRAM" if on_cpu else "VRAM",
        device=0 if on_cpu else max(tensor.get_device(), 0),
        page_format=backends[0] + (f"/{isa}" if isa else ""),
        layers=tuple(layers),
    )


def memory_regions(kv_caches: Mapping[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """The allocations behind the tensors, once each: (address, bytes, device)."""
    regions: dict[int, tuple[int, int, int]] = {}
    for tensor in kv_caches.values():
        storage = tensor.untyped_storage()
        regions[storage.data_ptr()] = (storage.data_ptr(), storage.nbytes(), max(tensor.get_device(), 0))
    return list(regions.values())


def _slab(vllm_config: Any, name: str, backends: list[str]) -> tuple[Slab, str]:
    """How the kernel of this layer lays out a block, and the variant of the kernel if it has several."""
    if backends == ["CPU_ATTN"]:
        layer = vllm_config.compilation_config.static_forward_context.get(name)
        isa = str(getattr(layer, "isa", "") or "unknown")
        return (Slab.TRANSPOSED_KEYS if isa in ("vec", "vec16") else Slab.OPAQUE), isa
    rows = set(backends) <= ROW_BACKENDS or all("MLA" in backend for backend in backends)
    return (Slab.ROWS if rows else Slab.OPAQUE), ""


def _shard(name: str, tensor: torch.Tensor, first: int, heads: int, total: int, slab: Slab) -> LayerShard:
    """Describe a tensor of shape (blocks, heads, tokens, content) or, for MLA, (blocks, tokens, content)."""
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(1)
    if tensor.dim() != 4 or tensor.stride(3) != 1:
        raise ValueError(f"{name}: a KV cache of shape {tuple(tensor.shape)} is not known")
    blocks, held, tokens, content = tensor.shape
    if held != heads:
        raise ValueError(f"{name}: the tensor has {held} KV heads, tensor parallelism gives this rank {heads}")
    size = tensor.element_size()
    shard = LayerShard(
        layer=name,
        first_head=first,
        heads=heads,
        total_heads=total,
        address=tensor.data_ptr(),
        blocks=blocks,
        block_tokens=tokens,
        block_stride=tensor.stride(0) * size,
        head_stride=tensor.stride(1) * size,
        token_stride=tensor.stride(2) * size,
        state_bytes=content * size,
        element_bytes=size,
        slab=slab,
    )
    if slab is not Slab.ROWS and shard.token_stride != shard.state_bytes:
        raise ValueError(f"{name}: blocks of this kernel are expected to be contiguous")
    return shard
