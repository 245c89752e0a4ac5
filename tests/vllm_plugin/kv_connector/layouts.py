"""Layouts and memories for the connector's tests, and an independent word on where every element lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hexgen2.vllm_plugin.kv_connector.shards import LayerShard, Slab, WorkerTable, head_interval

ELEMENT = np.dtype(np.float32)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its TP degree and its number of layers."""

    tp: int
    layers: int


@dataclass
class Memory:
    """One worker's KV cache: an array of elements for each layer, and the table that describes it."""

    table: WorkerTable
    arrays: dict[str, np.ndarray]


def build_memories(
    stages: Sequence[Stage],
    *,
    kv_heads: int,
    channels: int,
    blocks: int,
    block_tokens: int,
    slab: Slab = Slab.ROWS,
    heads_outside: bool = True,
) -> list[Memory]:
    """The workers of an engine, with zeroed caches. A state has `channels` elements of K and as many of V."""
    memories = []
    first_layer = 0
    for stage in stages:
        for rank in range(stage.tp):
            first, heads = head_interval(kv_heads, stage.tp, rank)
            arrays, shards = {}, []
            for layer in range(first_layer, first_layer + stage.layers):
                array = np.zeros(blocks * heads * block_tokens * 2 * channels, dtype=ELEMENT)
                state = 2 * channels * ELEMENT.itemsize
                head_stride, token_stride = (
                    (block_tokens * state, state) if heads_outside else (state, heads * state)
                )
                arrays[f"layers.{layer}"] = array
                shards.append(
                    LayerShard(
                        layer=f"layers.{layer}",
                        first_head=first,
                        heads=heads,
                        total_heads=kv_heads,
                        address=array.ctypes.data,
                        blocks=blocks,
                        block_tokens=block_tokens,
                        block_stride=heads * block_tokens * state,
                        head_stride=head_stride,
                        token_stride=token_stride,
                        state_bytes=state,
                        element_bytes=ELEMENT.itemsize,
                        slab=slab,
                    )
                )
            memories.append(Memory(WorkerTable(len(memories), "DRAM", 0, "test", tuple(shards)), arrays))
        first_layer += stage.layers
    return memories


def element_offset(shard: LayerShard, block: int, head: int, token: int, channel: int) -> int:
    """Index of an element in a layer's array; `head` is the model's, channels 0 to c are K, c to 2c are V."""
    size = shard.element_bytes
    slab = block * shard.block_stride // size + (head - shard.first_head) * shard.head_stride // size
    if shard.slab is not Slab.TRANSPOSED_KEYS:
        return slab + token * shard.token_stride // size + channel
    half = shard.state_bytes // size // 2
    if channel < half:
        return slab + channel * shard.block_tokens + token
    return slab + shard.block_tokens * half + token * half + channel - half


def value(layer: int, head: int, token: int, channel: int) -> float:
    """A number of its own, never 0, for every element of a sequence (exact in float32)."""
    return float(1 + ((layer * 8 + head) * 512 + token) * 16 + channel)


def each_element(shard: LayerShard, block_ids: Sequence[int], start: int, stop: int):
    """(offset, value) of each element of tokens `start` to `stop` of a sequence in `block_ids`."""
    layer = int(shard.layer.split(".")[1])
    for token in range(start, stop):
        block = block_ids[token // shard.block_tokens]
        for head in range(shard.first_head, shard.end_head):
            for channel in range(shard.state_bytes // shard.element_bytes):
                offset = element_offset(shard, block, head, token % shard.block_tokens, channel)
                yield offset, value(layer, head, token, channel)


def write_sequence(memory: Memory, block_ids: Sequence[int], tokens: int, only: str = "") -> None:
    """Write a sequence's first `tokens` tokens; with `only` in one layer."""
    for shard in memory.table.layers:
        if only and shard.layer != only:
            continue
        for offset, number in each_element(shard, block_ids, 0, tokens):
            memory.arrays[shard.layer][offset] = number


def wrong_elements(memory: Memory, block_ids: Sequence[int], start: int, stop: int) -> int:
    """How many elements of tokens `start` to `stop` are not what they should be."""
    return sum(
        memory.arrays[shard.layer][offset] != number
        for shard in memory.table.layers
        for offset, number in each_element(shard, block_ids, start, stop)
    )


def untouched(memory: Memory, block_ids: Sequence[int]) -> bool:
    """Whether every block but these is still zero."""
    for shard in memory.table.layers:
        blocks = memory.arrays[shard.layer].reshape(shard.blocks, -1)
        if np.delete(blocks, list(block_ids), axis=0).any():
            return False
    return True
