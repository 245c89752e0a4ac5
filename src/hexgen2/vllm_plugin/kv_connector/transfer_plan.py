"""Who reads what from whom: the intersection of two layouts.

For each layer of the receiving worker its interval of KV heads is cut at the senders' boundaries, and each part
gets one sender that holds it. There is no ratio of TP degrees in it and no special case: stages that differ in
TP, layers that are split unevenly, replicated heads and MLA (one head that every rank holds) are only other
intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hexgen2.vllm_plugin.kv_connector.shards import LayerShard, WorkerTable


class PlanError(Exception):
    """The senders do not hold what the receiver needs, or hold it in a form that it cannot take."""


@dataclass(frozen=True)
class Piece:
    """Heads `first_head` to `end_head` of one layer, read from sender number `sender`."""

    layer: str
    first_head: int
    end_head: int
    sender: int


def plan_pieces(receiver: WorkerTable, senders: Sequence[WorkerTable]) -> tuple[Piece, ...]:
    """The pieces that `receiver` reads, in the order of its layers; each of its (layer, head) is in exactly
    one.

    Where several senders hold a head, receivers of different ranks take different ones, so that replicas share
    the load. Raises PlanError if a head is held by nobody or the two sides' pages cannot be matched.
    """
    holders: dict[str, list[tuple[int, LayerShard]]] = {}
    for number, sender in enumerate(senders):
        for shard in sender.layers:
            holders.setdefault(shard.layer, []).append((number, shard))
    pieces: list[Piece] = []
    for shard in receiver.layers:
        candidates = holders.get(shard.layer, [])
        for number, other in candidates:
            _check_match(shard, receiver, other, senders[number])
        pieces.extend(_pieces_of_layer(shard, receiver.rank, candidates))
    return tuple(pieces)


def _pieces_of_layer(shard: LayerShard, rank: int, candidates: Sequence[tuple[int, LayerShard]]) -> list[Piece]:
    cuts = {shard.first_head, shard.end_head}
    for _, other in candidates:
        cuts |= {
            head for head in (other.first_head, other.end_head) if shard.first_head < head < shard.end_head
        }
    bounds = sorted(cuts)
    pieces: list[Piece] = []
    for first, end in pairwise(bounds):
        owners = [number for number, other in candidates if other.first_head <= first and end <= other.end_head]
        if not owners:
            raise PlanError(f"no sender holds KV heads {first} to {end} of {shard.layer}")
        owner = owners[rank % len(owners)]
        if pieces and pieces[-1].sender == owner:
            pieces[-1] = Piece(shard.layer, pieces[-1].first_head, end, owner)
        else:
            pieces.append(Piece(shard.layer, first, end, owner))
    return pieces


def _check_match(shard: LayerShard, receiver: WorkerTable, other: LayerShard, sender: WorkerTable) -> None:
    mine = (shard.total_heads, shard.state_bytes, shard.element_bytes, shard.slab, receiver.page_format)
    theirs = (other.total_heads, other.state_bytes, other.element_bytes, other.slab, sender.page_format)
    if mine != theirs:
        names = (
            "KV heads",
            "bytes per token and head",
            "bytes per element",
            "page layout",
            "attention backend",
        )
        name, here, there = next((name, a, b) for name, a, b in zip(names, mine, theirs, strict=True) if a != b)
        raise PlanError(f"{shard.layer}: the two sides differ in {name}: {there} there, {here} here")


def received_bytes(receiver: WorkerTable, tokens: int) -> int:
    """Bytes that a worker holds for `tokens` tokens: what a transfer of as many whole blocks must move.

    >>> from hexgen2.vllm_plugin.kv_connector.shards import LayerShard, Slab, WorkerTable
    >>> shard = LayerShard("l0", 0, 2, 4, 0, 8, 16, 4096, 2048, 128, 128, 2, Slab.ROWS)
    >>> received_bytes(WorkerTable(0, "DRAM", 0, "x", (shard,)), 32)
    8192
    """
    return sum(shard.heads * shard.state_bytes * tokens for shard in receiver.layers)
