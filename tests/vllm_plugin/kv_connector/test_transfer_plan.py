"""Any two layouts: every (layer, head, token) of the receiver is written exactly once, with the right bytes."""

from __future__ import annotations

import ctypes
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.vllm_plugin.kv_connector.regions import (
    Regions,
    concatenate,
    kernel_blocks,
    layer_regions,
    token_chunks,
)
from hexgen2.vllm_plugin.kv_connector.shards import Slab, head_interval
from hexgen2.vllm_plugin.kv_connector.transfer_plan import PlanError, plan_pieces, received_bytes

from .layouts import Memory, Stage, build_memories, untouched, write_sequence, wrong_elements

LAYERS = 4


@st.composite
def stages(draw: st.DrawFn, kv_heads: int) -> list[Stage]:
    """An asymmetric layout of LAYERS layers; TP divides the heads or is a multiple of their number."""
    degrees = [tp for tp in (1, 2, 4, 8) if tp % kv_heads == 0 or kv_heads % tp == 0]
    cuts = sorted(draw(st.sets(st.integers(1, LAYERS - 1), max_size=2)))
    bounds = [0, *cuts, LAYERS]
    return [Stage(draw(st.sampled_from(degrees)), end - first) for first, end in pairwise(bounds)]


@st.composite
def cases(draw: st.DrawFn) -> dict:
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    slab = draw(st.sampled_from(list(Slab)))
    block_tokens = st.sampled_from([2, 4, 8])
    local = draw(block_tokens)
    remote = local if slab is Slab.OPAQUE else draw(block_tokens)
    tokens = draw(st.integers(1, 24))
    start = draw(st.integers(0, (tokens - 1) // local)) * local  # the local prefix cache holds whole blocks
    rows = slab is Slab.ROWS
    return {
        "receivers": build_memories(
            draw(stages(heads)), kv_heads=heads, channels=2, blocks=16, block_tokens=local, slab=slab,
            heads_outside=draw(st.booleans()) if rows else True,
        ),
        "senders": build_memories(
            draw(stages(heads)), kv_heads=heads, channels=2, blocks=14, block_tokens=remote, slab=slab,
            heads_outside=draw(st.booleans()) if rows else True,
        ),
        "tokens": tokens,
        "start": start,
        "here": draw(st.permutations(range(16)))[: -(-tokens // local)],
        "there": draw(st.permutations(range(14)))[: -(-tokens // remote)],
    }  # fmt: skip


def regions_of(receiver: Memory, senders: list[Memory], case: dict) -> Regions:
    """As the loader puts them together, for one receiver."""
    parts = []
    for piece in plan_pieces(receiver.table, [sender.table for sender in senders]):
        here = next(shard for shard in receiver.table.layers if shard.layer == piece.layer)
        there = next(shard for shard in senders[piece.sender].table.layers if shard.layer == piece.layer)
        chunks = token_chunks(
            case["start"],
            case["tokens"],
            kernel_blocks(case["here"], 1),
            here.block_tokens,
            kernel_blocks(case["there"], 1),
            there.block_tokens,
        )
        parts.append(layer_regions(here, there, piece.first_head, piece.end_head, chunks))
    return concatenate(parts)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_what_arrives_is_what_was_sent_and_each_byte_once(case: dict) -> None:
    senders, start, tokens = case["senders"], case["start"], case["tokens"]
    for sender in senders:
        write_sequence(sender, case["there"], tokens)
    for receiver in case["receivers"]:
        regions = regions_of(receiver, senders, case)
        ends = regions.local + regions.length
        assert (regions.local[1:] >= ends[:-1]).all(), "a byte would be written twice"
        for local, remote, length in zip(regions.local, regions.remote, regions.length, strict=True):
            ctypes.memmove(int(local), int(remote), int(length))
        assert wrong_elements(receiver, case["here"], start, tokens) == 0
        assert untouched(receiver, case["here"][start // receiver.table.layers[0].block_tokens :])
        grid = math.gcd(receiver.table.layers[0].block_tokens, senders[0].table.layers[0].block_tokens)
        moved = -(-tokens // grid) * grid - start
        assert regions.total_bytes == received_bytes(receiver.table, moved)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_head_of_each_layer_has_exactly_one_owner_that_holds_it(data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from([1, 2, 4, 8]))
    sizes = {"kv_heads": heads, "channels": 1, "blocks": 1, "block_tokens": 1}
    senders = build_memories(data.draw(stages(heads)), **sizes)
    for receiver in build_memories(data.draw(stages(heads)), **sizes):
        pieces = plan_pieces(receiver.table, [sender.table for sender in senders])
        wanted = [
            (shard.layer, head)
            for shard in receiver.table.layers
            for head in range(shard.first_head, shard.end_head)
        ]
        planned = [(piece.layer, head) for piece in pieces for head in range(piece.first_head, piece.end_head)]
        assert sorted(planned) == sorted(wanted)
        for piece in pieces:
            held = {shard.layer: shard for shard in senders[piece.sender].table.layers}[piece.layer]
            assert held.first_head <= piece.first_head
            assert piece.end_head <= held.end_head


def test_replicas_of_a_head_share_the_readers() -> None:
    sizes = {"kv_heads": 1, "channels": 1, "blocks": 1, "block_tokens": 1}
    senders = [memory.table for memory in build_memories([Stage(4, 1)], **sizes)]
    receivers = build_memories([Stage(4, 1)], **sizes)
    assert {plan_pieces(receiver.table, senders)[0].sender for receiver in receivers} == {0, 1, 2, 3}


def test_equal_layouts_with_consecutive_blocks_are_one_descriptor_a_layer() -> None:
    sizes = {"kv_heads": 4, "channels": 2, "blocks": 16, "block_tokens": 8}
    (receiver,) = build_memories([Stage(1, 2)], **sizes)
    (sender,) = build_memories([Stage(1, 2)], **sizes)
    case = {"start": 0, "tokens": 40, "here": [3, 4, 5, 6, 7], "there": [8, 9, 10, 11, 12]}
    assert len(regions_of(receiver, [sender], case)) == 2


def test_a_smaller_tp_reads_whole_runs_of_heads() -> None:
    (receiver,) = build_memories([Stage(1, 1)], kv_heads=4, channels=2, blocks=4, block_tokens=8)
    senders = build_memories([Stage(2, 1)], kv_heads=4, channels=2, blocks=4, block_tokens=8)
    case = {"start": 0, "tokens": 16, "here": [0, 2], "there": [1, 3]}
    assert len(regions_of(receiver, senders, case)) == 4  # 2 blocks x 2 senders, 2 heads each


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        ({"kv_heads": 2}, "KV heads"),
        ({"channels": 4}, "bytes per token"),
        ({"slab": Slab.OPAQUE}, "page layout"),
        ({"stages": [Stage(1, 1)]}, r"no sender holds KV heads 0 to 4 of layers\.1"),
    ],
)
def test_sides_that_do_not_fit_are_refused(sender: dict, message: str) -> None:
    sizes = {"stages": [Stage(1, 2)], "kv_heads": 4, "channels": 2, "blocks": 2, "block_tokens": 2}
    (receiver,) = build_memories(**sizes)
    (other,) = build_memories(**(sizes | sender))
    with pytest.raises(PlanError, match=message):
        plan_pieces(receiver.table, [other.table])


def test_blocks_that_cannot_be_cut_must_have_one_size() -> None:
    sizes = {"kv_heads": 1, "channels": 2, "blocks": 4, "slab": Slab.OPAQUE}
    (receiver,) = build_memories([Stage(1, 1)], block_tokens=2, **sizes)
    (sender,) = build_memories([Stage(1, 1)], block_tokens=4, **sizes)
    case = {"start": 0, "tokens": 4, "here": [0, 1], "there": [0]}
    with pytest.raises(PlanError, match="4 tokens there, 2 here"):
        regions_of(receiver, [sender], case)


@pytest.mark.parametrize(
    ("start", "stop", "message"), [(1, 4, "starts at token 1"), (0, 9, "tokens up to 10 are wanted")]
)
def test_token_ranges_that_the_blocks_do_not_hold_are_refused(start: int, stop: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        token_chunks(start, stop, np.arange(4), 2, np.arange(2), 4)


def test_a_block_beyond_the_cache_is_refused() -> None:
    sizes = {"kv_heads": 1, "channels": 2, "blocks": 4, "block_tokens": 4}
    (receiver,) = build_memories([Stage(1, 1)], **sizes)
    (sender,) = build_memories([Stage(1, 1)], **sizes)
    with pytest.raises(PlanError, match="block 4 of 4"):
        regions_of(receiver, [sender], {"start": 0, "tokens": 4, "here": [0], "there": [4]})


@pytest.mark.parametrize(("total", "tp", "rank"), [(4, 3, 0), (3, 4, 0), (4, 2, 2)])
def test_heads_that_do_not_divide_are_refused(total: int, tp: int, rank: int) -> None:
    with pytest.raises(ValueError, match=r"of|multiple|divide"):
        head_interval(total, tp, rank)
