"""How much KV cache a CPU engine gets, and how long its requests may be.

A GPU engine measures what its GPU has left. A CPU engine would measure the whole machine, which it shares
with the other engines of the test bed, so it is told: its device's share (`memory_gib` in the catalog is what
one engine may fill with weights and KV cache) less the weights, but no more than
`EngineOptions.cpu_kv_cache_limit` and than its batch can ever use.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from hexgen2.cost.layout import StageShape
from hexgen2.cost.memory import stage_weight_bytes
from hexgen2.deploy.numerics import Numerics
from hexgen2.deploy.options import EngineOptions
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import weakest
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Group

ELEMENT_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
SPARE_BLOCKS = 2
"""vLLM keeps one block for itself; one more so that a longest request always fits."""


@dataclass(frozen=True)
class CpuCache:
    """`kv_bytes` per rank, and the longest request in tokens that fits."""

    kv_bytes: int
    max_model_len: int


def cpu_cache(
    group: Group, cluster: Cluster, model: Model, numerics: Numerics, options: EngineOptions, source: str
) -> CpuCache:
    """The KV cache of a group on CPU devices: the tightest stage decides, as it does in vLLM.

    Twice what a full batch of longest requests needs is the most that is asked for: a prefill engine keeps
    the caches of finished requests until the decode side has them. InputError where not even one block is
    left.
    """
    width = ELEMENT_BYTES.get(numerics.dtype, 4)
    full = model.model_copy(update={"weight_bytes": max(model.weight_bytes, width), "kv_bytes": float(width)})
    longest = options.max_model_len or model.max_positions
    tokens: list[int] = []
    for place, stage in enumerate(group.stages):
        device = weakest([cluster.gpu_by_id[gpu].type for gpu in stage.gpus])
        weights = stage_weight_bytes(
            full,
            StageShape(gpu=device, tp=stage.tp, layers=stage.layers),
            stage.first_layer,
            first=place == 0,
            last=place == len(group.stages) - 1,
        )
        room = min(device.memory_bytes * options.memory_utilisation - weights, options.cpu_kv_cache_limit)
        tokens.append(int(room // (_token_bytes(full, stage.tp) * stage.layers)))
    blocks = min(tokens) // numerics.block_size - SPARE_BLOCKS
    if blocks < 1:
        raise InputError(
            source,
            f"group {group.id}",
            "its devices have no room for a KV cache beside the weights",
            "plan with more devices in the group or with more memory_gib",
        )
    longest = min(longest, blocks * numerics.block_size)
    wanted = 2 * group.max_batch * ceil(longest / numerics.block_size)
    blocks = min(blocks, max(wanted, 1)) + SPARE_BLOCKS
    per_block = numerics.block_size * max(_token_bytes(full, stage.tp) * stage.layers for stage in group.stages)
    return CpuCache(kv_bytes=ceil(blocks * per_block), max_model_len=longest)


def _token_bytes(model: Model, tp: int) -> float:
    """Bytes that a token adds to a layer's cache on the fullest rank of ``tp``."""
    shards = model.kv_shards
    return model.kv_bytes_per_token_layer / shards * ceil(shards / tp)
