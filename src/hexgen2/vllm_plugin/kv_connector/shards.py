"""Which KV heads of which layers a worker holds, and how they lie in its memory.

A worker's *shard* of a layer is an interval of the layer's KV heads. Everything that two unlike layouts need to
agree on is in these tables: tensor parallelism only cuts the heads, pipeline parallelism only cuts the layers,
so the exchange of two tables says all, whatever the degrees on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Slab(StrEnum):
    """How the bytes of one (block, head) lie."""

    ROWS = "rows"
    """Token by token, `state_bytes` each: what GPU kernels use (K and V of a token side by side), and MLA."""
    TRANSPOSED_KEYS = "transposed-keys"
    """K first, stored channel by channel (each channel's tokens side by side), then V token by token: vLLM's
    CPU kernels.
    """
    OPAQUE = "opaque"
    """Unknown inside (AMX tiles, for instance): may be moved whole only."""


@dataclass(frozen=True)
class LayerShard:
    """A worker's part of one layer's KV cache. Sizes, strides and the address are in bytes.

    `blocks` and `block_tokens` are the *kernel's* blocks, the tensor's own; the scheduler's blocks may be
    several of them.
    """

    layer: str
    first_head: int
    heads: int
    total_heads: int
    address: int
    blocks: int
    block_tokens: int
    block_stride: int
    head_stride: int
    token_stride: int
    state_bytes: int
    element_bytes: int
    slab: Slab

    def __post_init__(self) -> None:
        for name in (
            "heads",
            "total_heads",
            "blocks",
            "block_tokens",
            "block_stride",
            "state_bytes",
            "element_bytes",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{self.layer}: {name} is {getattr(self, name)}, must be positive")
        if self.first_head < 0 or self.address < 0 or self.head_stride < 0 or self.token_stride < 0:
            raise ValueError(f"{self.layer}: negative offset")
        if self.first_head + self.heads > self.total_heads:
            raise ValueError(
                f"{self.layer}: heads {self.first_head} to {self.first_head + self.heads} of {self.total_heads}"
            )

    @property
    def end_head(self) -> int:
        return self.first_head + self.heads

    @property
    def slab_bytes(self) -> int:
        """Bytes of one (block, head)."""
        return self.block_tokens * self.state_bytes

    @property
    def dense(self) -> bool:
        """Whether one (block, head) is a single run of bytes."""
        return self.slab is not Slab.ROWS or self.token_stride == self.state_bytes


@dataclass(frozen=True)
class WorkerTable:
    """All that a peer must know about a worker's KV cache.

    `page_format` names the attention backend (two sides must agree on what the bytes mean), `memory` is NIXL's
    name of the memory type (`DRAM` or `VRAM`).
    """

    rank: int
    memory: str
    device: int
    page_format: str
    layers: tuple[LayerShard, ...]


def head_interval(total_heads: int, tp: int, tp_rank: int) -> tuple[int, int]:
    """First KV head and number of heads of a rank; with more ranks than heads each head has several owners.

    >>> head_interval(4, 2, 1)
    (2, 2)
    >>> [head_interval(2, 4, rank) for rank in range(4)]
    [(0, 1), (0, 1), (1, 1), (1, 1)]
    """
    if not 0 <= tp_rank < tp:
        raise ValueError(f"rank {tp_rank} of {tp}")
    if tp >= total_heads:
        if tp % total_heads:
            raise ValueError(f"TP {tp} is no multiple of {total_heads} KV heads")
        return tp_rank // (tp // total_heads), 1
    if total_heads % tp:
        raise ValueError(f"{total_heads} KV heads do not divide among TP {tp}")
    return tp_rank * (total_heads // tp), total_heads // tp
