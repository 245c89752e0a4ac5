"""KV transfer: who sends what, that nothing is lost, and what the links make of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.cost import PlacedStage, Placement, kv_loads, resources, route_capacity, shape, transfer_seconds
from hexgen2.cost.transfer import capacity, head_interval
from hexgen2.specs import MLA, Cluster, Lengths, Model, parse_cluster

LAYERS = 12


def model_of(kv_heads: int = 4, mla: bool = False, kv_bytes: float = 2.0) -> Model:
    latent = MLA(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    return Model(
        name="m",
        layers=LAYERS,
        hidden_size=1024,
        heads=24,
        kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=2048,
        vocab_size=8000,
        max_positions=4096,
        kv_bytes=kv_bytes,
        mla=latent if mla else None,
    )


@pytest.fixture
def cluster() -> Cluster:
    """Nodes a and b of 4 GPUs with NICs of 80 Gb/s = 10 GB/s, c of 4 without a limit; 40 Gb/s from a to b."""
    return parse_cluster(
        {
            "nodes": [
                {"name": "a", "gpu": "A100-80G-PCIe", "count": 4, "nic_gbps": 80},
                {"name": "b", "gpu": "H100-80G-SXM", "count": 4, "nic_gbps": 80},
                {"name": "c", "gpu": "A100-80G-PCIe", "count": 4},
            ],
            "network": {
                "default": {"gbps": 8, "latency_ms": 1},
                "links": [{"between": ["a", "b"], "gbps": 40, "latency_ms": 0.1}],
            },
        },
        "test",
    )


@st.composite
def placements(draw: st.DrawFn, first_gpu: int = 0) -> Placement:
    """Up to four stages of 1 to 9 GPUs with any run of layers."""
    cuts = sorted(draw(st.sets(st.integers(1, LAYERS - 1), max_size=3)))
    stages = []
    gpu = first_gpu
    for start, end in zip([0, *cuts], [*cuts, LAYERS], strict=True):
        tp = draw(st.integers(1, 9))
        stages.append(PlacedStage(tuple(range(gpu, gpu + tp)), start, end - start))
        gpu += tp
    return tuple(stages)


@given(
    source=placements(),
    target=placements(100),
    kv_heads=st.sampled_from([1, 2, 3, 4, 6, 8]),
    mla=st.booleans(),
    kv_bytes=st.sampled_from([1.0, 2.0]),
    tokens=st.integers(1, 10_000),
)
def test_every_receiver_gets_exactly_what_it_holds(
    source: Placement, target: Placement, kv_heads: int, mla: bool, kv_bytes: float, tokens: int
) -> None:
    model = model_of(kv_heads, mla, kv_bytes)
    loads = kv_loads(model, source, target, tokens)
    by_receiver: dict[int, float] = {}
    for (sender, receiver), size in loads.items():
        assert sender < 100 <= receiver
        assert size > 0
        by_receiver[receiver] = by_receiver.get(receiver, 0.0) + size
    per_head = model.kv_bytes_per_token_layer / model.kv_shards * tokens
    for stage in target:
        for rank, gpu in enumerate(stage.gpus):
            first, end = head_interval(rank, len(stage.gpus), model.kv_shards)
            assert by_receiver[gpu] == pytest.approx(stage.layers * (end - first) * per_head)
    copies = [max(1.0, len(stage.gpus) / model.kv_shards) for stage in target]
    expected = sum(
        stage.layers * model.kv_bytes_per_token_layer * tokens * copy
        for stage, copy in zip(target, copies, strict=True)
    )
    assert math.fsum(loads.values()) == pytest.approx(expected)
    if max(copies) == 1:
        assert math.fsum(loads.values()) == pytest.approx(tokens * model.kv_bytes_per_token, rel=1e-15)


@given(source=placements(), target=placements(100), tokens=st.integers(1, 10_000))
def test_bytes_are_conserved_to_the_last_one(source: Placement, target: Placement, tokens: int) -> None:
    """With a KV head for each receiving rank the sum is exact, not only close."""
    model = model_of(kv_heads=12)
    assert sum(kv_loads(model, source, target, tokens).values()) == tokens * model.kv_bytes_per_token


@pytest.mark.parametrize("kv_heads", [1, 3, 4, 8])
@pytest.mark.parametrize("tp", range(1, 17))
def test_head_intervals_cover_all_heads(kv_heads: int, tp: int) -> None:
    intervals = [head_interval(rank, tp, kv_heads) for rank in range(tp)]
    heads = sorted(head for first, end in intervals for head in range(first, end))
    assert set(heads) == set(range(kv_heads))
    assert len(heads) == max(tp, kv_heads)
    assert intervals == sorted(intervals)


def test_senders_with_the_same_heads_share_the_work() -> None:
    source = (PlacedStage((0, 1, 2, 3), 0, LAYERS),)
    target = (PlacedStage((10, 11), 0, LAYERS),)
    loads = kv_loads(model_of(mla=True), source, target, 1.0)
    assert set(loads) == {(0, 10), (1, 11)}


def test_hand_worked_asymmetric_case() -> None:
    # 4 KV heads of 512 bytes per token and layer. Source: TP2 for 8 layers, TP1 for 4; target TP4.
    source = (PlacedStage((0, 1), 0, 8), PlacedStage((2,), 8, 4))
    target = (PlacedStage((4, 5, 6, 7), 0, 12),)
    loads = kv_loads(model_of(), source, target, 10)
    head = 2 * 128 * 2 * 10
    assert loads == {
        (0, 4): 8 * head,
        (0, 5): 8 * head,
        (1, 6): 8 * head,
        (1, 7): 8 * head,
        (2, 4): 4 * head,
        (2, 5): 4 * head,
        (2, 6): 4 * head,
        (2, 7): 4 * head,
    }


def test_resources_and_capacities(cluster: Cluster) -> None:
    loads = {(0, 4): 100.0, (1, 5): 50.0, (0, 2): 7.0, (2, 8): 11.0}
    assert resources(cluster, loads) == {
        ("link", 0, 1): 150.0,
        ("nic_out", 0): 161.0,
        ("nic_in", 1): 150.0,
        ("gpu_out", 0): 7.0,
        ("link", 0, 2): 11.0,
    }
    assert capacity(cluster, ("link", 0, 1)) == 5e9
    assert capacity(cluster, ("nic_out", 0)) == 10e9
    assert capacity(cluster, ("nic_in", 2)) == math.inf
    assert capacity(cluster, ("gpu_out", 4)) == cluster.gpus[4].type.link.bandwidth


def test_route_capacity_and_latency(cluster: Cluster) -> None:
    model = model_of()
    source, target = ((PlacedStage((0, 1), 0, LAYERS),), (PlacedStage((4, 5), 0, LAYERS),))
    lengths = Lengths(np.array([100, 300]), np.array([1, 1]))
    size = 200 * model.kv_bytes_per_token
    assert route_capacity(model, cluster, source, target, lengths) == pytest.approx(5e9 / size)
    assert transfer_seconds(model, cluster, source, target, 200) == pytest.approx(size / 5e9 + 1e-4)


def test_shape_of_a_placement(cluster: Cluster) -> None:
    placement = (PlacedStage((0, 4), 0, 5), PlacedStage((5, 8), 5, 7))
    first, second = shape(cluster, placement)
    assert first.gpu.name == "A100-80G-PCIe+H100-80G-SXM"
    assert (first.tp, first.layers, first.upstream) == (2, 5, None)
    assert first.link is not None
    assert (first.link.bandwidth, first.link.latency) == (5e9, 1e-4)
    # Rank 0 (GPU 5) reads from GPU 0 over 40 Gb/s, rank 1 (GPU 8) from GPU 4 over 8 Gb/s and 1 ms.
    assert second.upstream is not None
    assert (second.upstream.bandwidth, second.upstream.latency) == (1e9, 1e-3)
    assert shape(cluster, (PlacedStage((3,), 0, 12),))[0].link is None
