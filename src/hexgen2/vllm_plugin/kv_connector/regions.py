"""From blocks of tokens to runs of bytes: which addresses are read to which.

Everything here is arithmetic on numpy arrays; nothing touches memory. Runs that are adjacent on both sides are
merged, so that equal layouts with consecutive blocks end as few, large descriptors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexgen2.vllm_plugin.kv_connector.shards import LayerShard, Slab
from hexgen2.vllm_plugin.kv_connector.transfer_plan import PlanError

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Regions:
    """Runs of bytes: `length[i]` bytes at `remote[i]` are read to `local[i]`. Addresses in bytes."""

    local: Array
    remote: Array
    length: Array

    @property
    def total_bytes(self) -> int:
        return int(self.length.sum())

    def __len__(self) -> int:
        return len(self.length)

    def moved(self, local: int, remote: int) -> Regions:
        """The same runs, so many bytes further on either side."""
        return Regions(self.local + local, self.remote + remote, self.length)


@dataclass(frozen=True)
class TokenChunks:
    """Runs of tokens that lie in one kernel block on each side. All arrays have one entry a run.

    Tokens `local_token[i]` to `local_token[i] + tokens[i]` of block `local_block[i]` come from as many tokens
    from `remote_token[i]` of block `remote_block[i]`.
    """

    local_block: Array
    local_token: Array
    remote_block: Array
    remote_token: Array
    tokens: Array


def kernel_blocks(blocks: Sequence[int], per_block: int) -> Array:
    """The kernel's blocks behind the scheduler's blocks.

    >>> kernel_blocks([3, 7], 2).tolist()
    [6, 7, 14, 15]
    """
    ids = np.asarray(blocks, dtype=np.int64)
    return (ids[:, None] * per_block + np.arange(per_block, dtype=np.int64)).reshape(-1)


def token_chunks(
    start: int, stop: int, local: Array, local_tokens: int, remote: Array, remote_tokens: int
) -> TokenChunks:
    """Match the blocks that hold tokens `start` to `stop` on both sides, which may have blocks of different
    size.

    `local` and `remote` are the kernel blocks of the request from token 0 on, of `local_tokens` and
    `remote_tokens` tokens each. `stop` is rounded up to the grid that both block sizes share (whole blocks if
    they are equal): the tokens beyond are not valid yet and belong to nobody else. Raises PlanError if `start`
    is off that grid or blocks are missing.
    """
    grid = math.gcd(local_tokens, remote_tokens)
    if start % grid:
        raise PlanError(f"the transfer starts at token {start}, within a block of {grid} tokens")
    stop = -(-stop // grid) * grid
    if stop > len(local) * local_tokens or stop > len(remote) * remote_tokens:
        raise PlanError(
            f"tokens up to {stop} are wanted, the blocks here hold {len(local) * local_tokens}"
            f" and there {len(remote) * remote_tokens}"
        )
    bounds = np.unique(
        np.concatenate(
            [
                np.array([start, stop], dtype=np.int64),
                np.arange(-(-start // local_tokens) * local_tokens, stop, local_tokens, dtype=np.int64),
                np.arange(-(-start // remote_tokens) * remote_tokens, stop, remote_tokens, dtype=np.int64),
            ]
        )
    )
    firsts, ends = bounds[:-1], bounds[1:]
    return TokenChunks(
        local[firsts // local_tokens],
        firsts % local_tokens,
        remote[firsts // remote_tokens],
        firsts % remote_tokens,
        ends - firsts,
    )


def layer_regions(
    here: LayerShard, there: LayerShard, first_head: int, end_head: int, chunks: TokenChunks
) -> Regions:
    """The runs of bytes for heads `first_head` to `end_head` (of the layer, not of the shard) of one layer."""
    if not len(chunks.tokens):
        empty = np.empty(0, dtype=np.int64)
        return Regions(empty, empty, empty)
    for shard, blocks in ((here, chunks.local_block), (there, chunks.remote_block)):
        if int(blocks.max()) >= shard.blocks or int(blocks.min()) < 0:
            raise PlanError(f"{shard.layer}: block {int(blocks.max())} of {shard.blocks}")
    parts: list[Regions] = []
    patterns = np.stack([chunks.local_token, chunks.remote_token, chunks.tokens], axis=1)
    for pattern in np.unique(patterns, axis=0):
        chosen = (patterns == pattern).all(axis=1)
        inside = _runs_in_block(here, there, first_head, end_head, *map(int, pattern))
        local = here.address + chunks.local_block[chosen] * here.block_stride
        remote = there.address + chunks.remote_block[chosen] * there.block_stride
        shape = (len(local), len(inside))
        parts.append(
            Regions(
                np.add.outer(local, inside.local).reshape(-1),
                np.add.outer(remote, inside.remote).reshape(-1),
                np.broadcast_to(inside.length, shape).reshape(-1),
            )
        )
    return concatenate(parts)


def concatenate(parts: Sequence[Regions]) -> Regions:
    """All regions as one list, sorted by local address, with neighbours merged."""
    local = np.concatenate([part.local for part in parts])
    remote = np.concatenate([part.remote for part in parts])
    length = np.concatenate([part.length for part in parts])
    order = np.argsort(local, kind="stable")
    local, remote, length = local[order], remote[order], length[order]
    if len(local) < 2:
        return Regions(local, remote, length)
    follows = (local[:-1] + length[:-1] == local[1:]) & (remote[:-1] + length[:-1] == remote[1:])
    heads = np.flatnonzero(np.concatenate([[True], ~follows]))
    return Regions(local[heads], remote[heads], np.add.reduceat(length, heads))


def _runs_in_block(
    here: LayerShard,
    there: LayerShard,
    first_head: int,
    end_head: int,
    local_token: int,
    remote_token: int,
    tokens: int,
) -> Regions:
    """Runs of one block on each side, as offsets from the block's start."""
    heads = end_head - first_head
    local = (first_head - here.first_head) * here.head_stride
    remote = (first_head - there.first_head) * there.head_stride
    by_head = (heads, here.head_stride, there.head_stride)
    whole = tokens == here.block_tokens == there.block_tokens
    if whole and here.dense and there.dense:
        return _fold(local, remote, here.slab_bytes, [by_head])
    if Slab.OPAQUE in (here.slab, there.slab):
        raise PlanError(
            f"{here.layer}: this attention kernel's blocks cannot be cut, so the block sizes of both sides"
            f" must agree ({there.block_tokens} tokens there, {here.block_tokens} here)"
        )
    parts = []
    for mine, theirs in zip(_planes(here), _planes(there), strict=True):
        parts.append(
            _fold(
                local + mine.offset + local_token * mine.token_stride,
                remote + theirs.offset + remote_token * theirs.token_stride,
                mine.token_bytes,
                [
                    by_head,
                    (mine.rows, mine.row_stride, theirs.row_stride),
                    (tokens, mine.token_stride, theirs.token_stride),
                ],
            )
        )
    return concatenate(parts)


@dataclass(frozen=True)
class _Plane:
    """A part of a (block, head): token t has `rows` pieces of `token_bytes` at offset + row·row_stride +
    t·token_stride.
    """

    offset: int
    rows: int
    row_stride: int
    token_stride: int
    token_bytes: int


def _planes(shard: LayerShard) -> tuple[_Plane, ...]:
    if shard.slab is Slab.ROWS:
        return (_Plane(0, 1, 0, shard.token_stride, shard.state_bytes),)
    half = shard.state_bytes // 2  # bytes of one token's K, and of its V
    channels = half // shard.element_bytes
    return (
        _Plane(0, channels, shard.block_tokens * shard.element_bytes, shard.element_bytes, shard.element_bytes),
        _Plane(shard.block_tokens * half, 1, 0, half, half),
    )


def _fold(local: int, remote: int, run: int, axes: list[tuple[int, int, int]]) -> Regions:
    """Enumerate nested (count, local stride, remote stride) axes around a run of bytes.

    An axis whose strides equal the run on both sides only makes the run longer; it is tried innermost first.
    """
    left = sorted((axis for axis in axes if axis[0] > 1), key=lambda axis: axis[1])
    while left and left[0][1] == run == left[0][2]:
        run *= left.pop(0)[0]
    locals_ = np.array([local], dtype=np.int64)
    remotes = np.array([remote], dtype=np.int64)
    for count, local_stride, remote_stride in reversed(left):
        steps = np.arange(count, dtype=np.int64)
        locals_ = np.add.outer(locals_, steps * local_stride).reshape(-1)
        remotes = np.add.outer(remotes, steps * remote_stride).reshape(-1)
    return Regions(locals_, remotes, np.full(len(locals_), run, dtype=np.int64))
