"""The layout's arithmetic: numbering of ranks, columns, and who feeds whom."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.specs.errors import InputError
from hexgen2.vllm_plugin.asymmetric import Layout
from hexgen2.vllm_plugin.asymmetric.config import choose_devices

stage = st.tuples(st.integers(1, 4), st.integers(1, 5))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shapes = draw(st.lists(stage, min_size=1, max_size=5))
    nodes = [draw(st.integers(0, 2)) for _ in shapes]
    numbers = {node: index for index, node in enumerate(sorted(set(nodes)))}
    text = "+".join(f"{tp}x{layers}@{numbers[node]}" for (tp, layers), node in zip(shapes, nodes, strict=True))
    return Layout.parse(text, "test")


@given(layouts())
def test_ranks_are_numbered_node_by_node_and_each_stands_once(layout: Layout) -> None:
    assert [place.rank for place in layout.places] == list(range(layout.world_size))
    assert sorted(rank for ranks in layout.stage_ranks for rank in ranks) == list(range(layout.world_size))
    covered: list[int] = []
    for node in range(layout.nodes):
        ranks = layout.node_ranks(node)
        assert [layout.places[rank].local_rank for rank in ranks] == list(range(len(ranks)))
        assert all(layout.places[rank].node == node for rank in ranks)
        covered.extend(ranks)
    assert covered == list(range(layout.world_size))
    for index, ranks in enumerate(layout.stage_ranks):
        assert [layout.places[rank].tp_rank for rank in ranks] == list(range(layout.stages[index].tp))


@given(layouts())
def test_vllms_uniform_arithmetic_finds_the_stage_from_the_virtual_rank(layout: Layout) -> None:
    seen = set()
    for place in layout.places:
        tp = layout.stages[place.stage].tp
        virtual = layout.virtual_rank(place.rank)
        assert virtual // tp % len(layout.stages) == place.stage
        seen.add((virtual, tp))
    assert len(seen) == layout.world_size  # so that ranks do not share a compile cache


@given(layouts())
def test_every_rank_is_fed_by_one_rank_and_feeds_back(layout: Layout) -> None:
    received: list[int] = []
    for rank in range(layout.world_size):
        for receiver in layout.fed(rank):
            assert layout.feeder(receiver) == rank
            assert layout.places[receiver].stage == layout.places[rank].stage + 1
            received.append(receiver)
    assert sorted(received) == sorted(p.rank for p in layout.places if p.stage > 0)


@given(layouts())
def test_columns_divide_the_ranks_and_hold_one_rank_of_the_last_stage_each(layout: Layout) -> None:
    assert sorted(rank for column in layout.columns for rank in column) == list(range(layout.world_size))
    last = len(layout.stages) - 1
    for column in layout.columns:
        ends = [rank for rank in column if layout.places[rank].stage == last]
        assert len(ends) == 1
        assert {layout.chain(rank)[-1] for rank in column} == set(ends)


@given(layouts())
def test_a_chain_has_one_rank_of_each_stage_and_itself(layout: Layout) -> None:
    for place in layout.places:
        chain = layout.chain(place.rank)
        assert chain[place.stage] == place.rank
        assert [layout.places[rank].stage for rank in chain] == list(range(len(layout.stages)))


@pytest.mark.parametrize(("tp", "stages"), [(1, 3), (2, 2), (4, 3)])
def test_with_one_tp_chains_and_columns_are_vllms_pipeline_groups(tp: int, stages: int) -> None:
    layout = Layout.parse("+".join([f"{tp}x2"] * stages), "test")
    vllms = [tuple(range(column, tp * stages, tp)) for column in range(tp)]
    assert list(layout.columns) == vllms
    assert {layout.chain(rank) for rank in range(layout.world_size)} == set(vllms)


@given(layouts())
def test_a_document_reads_back(layout: Layout) -> None:
    assert Layout.parse(json.dumps(layout.document()), "test") == layout
    assert Layout.read(layout.document(), "test") == layout


def test_ranks_of_a_node_visited_twice_are_consecutive() -> None:
    layout = Layout.parse("1x2@0+2x2@1+1x2@0", "test")
    assert layout.stage_ranks == ((0,), (2, 3), (1,))
    assert layout.output_rank == 1
    assert layout.partition == "2,2,2"
    assert layout.feeder(1) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a stage"),
        ("2x5+x3", "'x3' is not a stage"),
        ("2x5 1x3", "'2x5 1x3' is not a stage"),
        ("0x5", "stages[0].tp"),
        ("1x0", "stages[0].layers"),
        ("1x4@1", "the nodes are [1]; number them from 0"),
        ("1x4@0+1x4@2", "the nodes are [0, 2]"),
        ("{", "Invalid JSON"),
        ('{"stages": []}', "stages"),
        ('{"stages": [{"tp": 1, "first_layer": 1, "layers": 3}]}', "starts at layer 1, not at 0"),
        ('{"stages": [{"tp": 1, "layers": 3}]}', "stages[0].first_layer: is missing"),
        (
            '{"stages": [{"tp": 2, "first_layer": 0, "layers": 3, "devices": [0]}]}',
            "tp is 2 but there are 1 devices",
        ),
        (
            '{"stages": [{"tp": 2, "first_layer": 0, "layers": 3, "devices": [0, 0]}]}',
            "node 0 uses a device twice",
        ),
        (
            '{"stages": [{"tp": 1, "first_layer": 0, "layers": 3, "devices": [0]},'
            ' {"tp": 1, "first_layer": 3, "layers": 3}]}',
            "some stages of node 0 name no devices",
        ),
    ],
)
def test_a_wrong_layout_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        Layout.parse(text, "--layout")
    message = str(caught.value)
    assert message.startswith("--layout")
    assert problem.lower() in message.lower()
    assert "\n" not in message


def devices_layout() -> Layout:
    stages = [
        {"tp": 1, "first_layer": 0, "layers": 2, "node": 0, "devices": [3]},
        {"tp": 2, "first_layer": 2, "layers": 2, "node": 1, "devices": [1, 0]},
        {"tp": 1, "first_layer": 4, "layers": 2, "node": 0, "devices": [2]},
    ]
    return Layout.read({"stages": stages}, "test")


@pytest.mark.parametrize(
    ("node", "before", "after"), [(0, None, "3,2"), (1, None, "1,0"), (0, "4,5,6,7", "7,6"), (1, "a,b", "b,a")]
)
def test_devices_are_shown_in_rank_order(
    monkeypatch: pytest.MonkeyPatch, node: int, before: str | None, after: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    choose_devices(devices_layout(), node, "CUDA_VISIBLE_DEVICES")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_without_devices_the_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    choose_devices(Layout.parse("1x3", "test"), 0, "CUDA_VISIBLE_DEVICES")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


def test_a_device_that_is_not_visible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(InputError, match="node 0 uses device 3, CUDA_VISIBLE_DEVICES shows 3"):
        choose_devices(devices_layout(), 0, "CUDA_VISIBLE_DEVICES")
