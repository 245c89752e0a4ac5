"""What holds of plans on any cluster: the independent checks, more hardware never hurts, names mean nothing.

The search is not exact, so "never hurts" allows its stated tolerance: it stays within 2% of the optimum of
small clusters (test_hexgen2.py holds it to that), and the optimum itself never falls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.scheduler import SOLVERS, schedule
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.errors import InputError
from tests.scheduler.checks import check_plan
from tests.scheduler.support import A100, A6000, H100, L40, LARGE, cluster, clusters, lengths, problem

TOLERANCE = 0.02
LOADS = st.sampled_from([(1500, 100), (300, 300), (1000, 30)])
ENGINES = st.sampled_from(["any", "vllm"])


def changed(where: Cluster, change: dict[str, Any]) -> Cluster:
    return parse_cluster({**where.document(), **change}, "changed")


def with_one_more_gpu(where: Cluster, node: int) -> Cluster:
    nodes = [dict(found) for found in where.document()["nodes"]]
    nodes[node]["count"] += 1
    return changed(where, {"nodes": nodes})


def with_faster_links(where: Cluster, times: float) -> Cluster:
    network = where.document()["network"]
    return changed(
        where,
        {
            "network": {
                "default": {**network["default"], "gbps": times * network["default"]["gbps"]},
                "links": [{**link, "gbps": times * link["gbps"]} for link in network["links"]],
            }
        },
    )


def value(where: Cluster, engine: str, load: tuple[int, int]) -> float:
    try:
        return schedule(problem(where, engine=engine, load=lengths(*load))).objective.value
    except InputError:
        return 0.0


@given(clusters(most_gpus=6), st.sampled_from(sorted(set(SOLVERS) - {"exhaustive"})), ENGINES, LOADS)
@settings(max_examples=25, deadline=None)
def test_every_plan_of_every_solver_keeps_to_the_hardware(
    where: Cluster, solver: str, engine: str, load: tuple[int, int]
) -> None:
    task = problem(where, engine=engine, load=lengths(*load))
    try:
        plan = schedule(task, solver=solver)
    except InputError:
        return  # a baseline that cannot lay out a cluster this small
    check_plan(plan, task.model, task.lengths)


@given(clusters(most_gpus=5), ENGINES, LOADS, st.data())
@settings(max_examples=12, deadline=None)
def test_one_more_gpu_never_lowers_the_objective(
    where: Cluster, engine: str, load: tuple[int, int], data: st.DataObject
) -> None:
    more = with_one_more_gpu(where, data.draw(st.integers(0, len(where.nodes) - 1)))
    assert value(more, engine, load) >= (1 - TOLERANCE) * value(where, engine, load)


@given(clusters(most_gpus=6), ENGINES, LOADS, st.floats(1.1, 20))
@settings(max_examples=12, deadline=None)
def test_faster_links_never_lower_the_objective(
    where: Cluster, engine: str, load: tuple[int, int], times: float
) -> None:
    assert value(with_faster_links(where, times), engine, load) >= (1 - TOLERANCE) * value(where, engine, load)


@given(clusters(most_gpus=7), ENGINES, LOADS, st.integers(0, 100))
@settings(max_examples=12, deadline=None)
def test_names_and_the_order_of_nodes_change_nothing(
    where: Cluster, engine: str, load: tuple[int, int], seed: int
) -> None:
    document = where.document()
    order = np.random.default_rng(seed).permutation(len(where.nodes))
    name = {f"n{place}": f"host-{int(order[place])}" for place in range(len(order))}
    renamed = {
        "nodes": [{**document["nodes"][place], "name": name[f"n{place}"]} for place in order],
        "network": {
            "default": document["network"]["default"],
            "links": [
                {**link, "between": [name[end] for end in reversed(link["between"])]}
                for link in document["network"]["links"]
            ],
        },
    }
    assert value(parse_cluster(renamed, "renamed"), engine, load) == pytest.approx(
        value(where, engine, load), rel=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "any"])
@pytest.mark.parametrize("load", [(1500, 100), (300, 300)])
def test_more_hardware_never_hurts_at_18_gpus(engine: str, load: tuple[int, int]) -> None:
    nodes = ((H100, 2), (A100, 4), (A100, 2), (L40, 4), (A6000, 4), (A6000, 2))
    where = cluster(*nodes, gbps=10, links={(0, 1): 50, (0, 2): 50, (1, 3): 25, (3, 4): 25})

    def served(changed_to: Cluster) -> float:
        return schedule(problem(changed_to, LARGE, engine, lengths(*load))).objective.value

    base = served(where)
    for node in range(len(nodes)):
        assert served(with_one_more_gpu(where, node)) >= (1 - TOLERANCE) * base
    for times in (1.5, 4.0):
        assert served(with_faster_links(where, times)) >= (1 - TOLERANCE) * base
