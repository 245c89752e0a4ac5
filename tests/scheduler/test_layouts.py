"""Layouts: water-filling, stage chains, and the layout as the cost model sees it."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.cost.layout import shape
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.layouts import (
    chains,
    count_partitions,
    layout_of,
    pipeline_order,
    templates,
    valid_tps,
    water_fill,
)
from hexgen2.scheduler.topology import Topology, size
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.model import Model
from tests.scheduler.support import A100, H100, L40, LARGE, LATENT, SMALL, cluster, clusters, problem


@pytest.mark.parametrize(
    ("total", "weights", "limits", "expected"),
    [
        (80, [1, 1], [80, 80], (40, 40)),
        (80, [2, 1, 1], [80, 80, 80], (40, 20, 20)),
        (80, [2, 1, 1], [30, 80, 80], (30, 25, 25)),
        (7, [1, 1], [7, 7], (4, 3)),
        (3, [100, 1, 1], [3, 3, 3], (1, 1, 1)),
        (10, [100, 1, 1], [10, 10, 10], (8, 1, 1)),
        (10, [1], [10], (10,)),
        (10, [1], [9], None),
        (2, [1, 1, 1], [9, 9, 9], None),
        (4, [1, 1], [4, 0], None),
    ],
)
def test_water_fill_table(
    total: int, weights: list[float], limits: list[int], expected: tuple[int, ...] | None
) -> None:
    assert water_fill(total, weights, limits) == expected


@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 14))
@settings(max_examples=150, deadline=None)
def test_water_fill_is_the_best_deal(stages: list[tuple[float, int]], total: int) -> None:
    weights, limits = [w for w, _ in stages], [u for _, u in stages]
    deals = [d for d in product(*(range(1, u + 1) for u in limits)) if sum(d) == total]
    found = water_fill(total, weights, limits)
    if not deals:
        assert found is None
        return
    assert found is not None
    assert found in deals

    def worst(deal: tuple[int, ...]) -> float:
        return max(count / weight for count, weight in zip(deal, weights, strict=True))

    assert worst(found) == pytest.approx(min(map(worst, deals)))


@pytest.mark.parametrize(
    ("model", "expected"),
    [(SMALL, (1, 2, 4, 8)), (LATENT, (1, 2, 4, 8)), (SMALL.model_copy(update={"kv_heads": 2}), (1, 2, 4, 8))],
)
def test_tp_sizes_split_heads_evenly(model: Model, expected: tuple[int, ...]) -> None:
    assert valid_tps(model, 8) == expected


def test_pipeline_follows_the_fastest_path() -> None:
    where = cluster((H100, 1), (A100, 1), (L40, 1), gbps=1, links={(0, 2): 100, (1, 2): 50})
    assert pipeline_order(Topology(where), [0, 1, 2]) == (0, 2, 1)


@given(clusters())
@settings(max_examples=40, deadline=None)
def test_chains_use_every_gpu_once(where: Cluster) -> None:
    topology = Topology(where)
    members = topology.everything
    found = list(chains(topology, members, (1, 2, 4, 8)))
    assert len(found) == len(set(found))
    for chain in found:
        counts: dict[int, int] = {}
        for stage in chain:
            assert size(stage) in (1, 2, 4, 8)
            for node, count in stage:
                counts[node] = counts.get(node, 0) + count
        assert counts == dict(members)


@given(clusters(most_gpus=6))
@settings(max_examples=25, deadline=None)
def test_templates_are_whole_and_look_like_their_placements(where: Cluster) -> None:
    task = problem(where)
    evaluator = Evaluator(task)
    for template in templates(evaluator.values, evaluator.topology.everything, evaluator.sizes):
        assert sum(stage.layers for stage in template) == SMALL.layers
        (placement,) = evaluator.place([template])
        assert layout_of(evaluator.topology, template) == shape(task.cluster, placement)


def test_layers_follow_memory_where_it_is_short() -> None:
    where = cluster((A100, 2), (L40, 2))
    evaluator = Evaluator(problem(where, LARGE))
    options = evaluator.options(evaluator.topology.everything, "prefill")
    assert options
    for option in options:
        by_node = {0: 0, 1: 0}
        for stage in option.template:
            for node, _ in stage.members:
                by_node[node] += stage.layers
        if all(len(stage.members) == 1 for stage in option.template):
            assert by_node[0] > by_node[1], "the A100s have 80 GB each, the L40s 48"


@pytest.mark.parametrize("thorough", [False, True])
def test_a_node_of_very_many_gpus_is_cut_in_few_ways(thorough: bool) -> None:
    """There are 10⁸ ways and more to cut 1,024 GPUs into powers of two: they must not be gone through."""
    topology, sizes = Topology(cluster((H100, 1024), (L40, 3))), (1, 2, 4, 8, 16, 32)
    assert count_partitions(1024, sizes) > 10**8
    found = list(chains(topology, topology.everything, sizes, thorough=thorough))
    assert 2 <= len(found) <= 6
    widest = [size(stage) for stage in found[-1] if stage[0][0] == 0]
    assert widest == [32] * 32
    for chain in found:
        assert sum(map(size, chain)) == 1027


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (1, 3, 4), (1, 2, 5, 7)])
@pytest.mark.parametrize("total", [1, 6, 13])
def test_ways_to_cut_a_node_are_counted_as_they_are_listed(total: int, sizes: tuple[int, ...]) -> None:
    listed = {
        tuple(sorted(size(stage) for stage in chain))
        for chain in chains(Topology(cluster((H100, total))), ((0, total),), sizes)
    }
    assert len(listed) == count_partitions(total, sizes)
