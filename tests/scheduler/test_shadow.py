"""Shadow prices: the duals are slopes of the routes' program, and doubled links are routes solved again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hexgen2.scheduler.evaluate import Evaluator, best_rate
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.routes import best_shares
from hexgen2.scheduler.schedule import schedule
from hexgen2.scheduler.settle import Settled, settle
from hexgen2.scheduler.shadow import Names, faster_links, marginal
from hexgen2.scheduler.solution import Cell, Solution, assess
from hexgen2.specs.cluster import parse_cluster
from hexgen2.specs.plan import ShadowPrice
from tests.scheduler.support import A100, A6000, H100, cluster, lengths, problem

NAMES = Names(["p0"], ["d0", "d1"], ["c0"])
STEP = 1e-4


def asked(gbps: float) -> Problem:
    """An H100 node that prefills for an A100 and an A6000 node, and one A100 that serves by itself."""
    return problem(cluster((H100, 2), (A100, 2), (A6000, 2), (A100, 1), gbps=gbps), load=lengths(count=16))


def settled(gbps: float) -> tuple[Evaluator, Solution, Settled]:
    evaluator = Evaluator(asked(gbps), best_rate)
    roles = ("prefill", "decode", "decode", "colocated")
    cells = [Cell(((node, 1 if node == 3 else 2),), role) for node, role in enumerate(roles)]
    solution = assess(evaluator, cells, coupled=True)
    assert solution is not None
    return evaluator, solution, settle(evaluator, solution)


def prices(gbps: float) -> dict[str, ShadowPrice]:
    evaluator, solution, found = settled(gbps)
    return {price.resource: price for price in marginal(evaluator.problem.cluster, solution, found, NAMES)}


@pytest.mark.parametrize("gbps", [0.3, 2.0, 100.0])
def test_a_groups_price_is_what_a_little_more_of_it_adds(gbps: float) -> None:
    _, solution, found = settled(gbps)
    assert solution.program is not None
    told = prices(gbps)
    for name, kind, row in (("p0", "prefill", 0), ("d0", "decode", 0), ("d1", "decode", 1)):
        capacities = getattr(solution.program, kind).copy()
        capacities[row] *= 1 + STEP
        slope = (best_shares(replace(solution.program, **{kind: capacities})).value - found.best.value) / STEP
        gain = told[name].gain_rps if name in told else 0.0
        assert gain == pytest.approx(0.1 * slope, abs=1e-3 * found.value)
    assert told["c0"].gain_rps == pytest.approx(0.1 * float(solution.flow.network.colocated[0]))
    assert all(price.how == "dual" and price.gain_rps > 0 for price in told.values())


def test_a_scarce_link_is_named_and_twice_its_speed_is_solved_again() -> None:
    evaluator, solution, found = settled(0.3)
    told = faster_links(evaluator.problem.cluster, evaluator, solution, found, NAMES)
    assert {price.resource for price in told} == {"link n0→n1", "link n0→n2"}
    for price in told:
        end = int(price.resource[-1])
        faster = problem(
            cluster((H100, 2), (A100, 2), (A6000, 2), (A100, 1), gbps=0.3, links={(0, end): 0.6}),
            load=lengths(count=16),
        )
        again = assess(Evaluator(faster, best_rate), solution.cells, coupled=True)
        assert again is not None
        assert price.gain_rps == pytest.approx(again.value - found.value, rel=1e-6)
        assert price.gain_rps > 0


def test_nothing_scarce_has_no_price() -> None:
    evaluator, solution, found = settled(400.0)
    assert faster_links(evaluator.problem.cluster, evaluator, solution, found, NAMES) == ()
    assert not [name for name in prices(400.0) if name.startswith("link")]


def test_a_plan_tells_how_much_its_links_carry() -> None:
    where = asked(2.0)
    plan = schedule(where, solver="paper")
    assert plan.links
    tokens = float(where.lengths.inputs.mean())
    for link in plan.links:
        sent = 0.0
        for route in plan.routes:
            ends = [plan.group_by_id[name].stages for name in (route.source, route.target)]
            crossing = 0.0
            for give in ends[0]:
                for take in ends[1]:
                    first = max(give.first_layer, take.first_layer)
                    layers = max(0, min(give.first_layer + give.layers, take.first_layer + take.layers) - first)
                    givers = sum(gpu.startswith(f"{link.source}/") for gpu in give.gpus) / give.tp
                    takers = sum(gpu.startswith(f"{link.target}/") for gpu in take.gpus) / take.tp
                    crossing += layers / where.model.layers * givers * takers
            sent += route.rps * crossing * tokens * where.model.kv_bytes_per_token
        assert link.bytes_per_s == pytest.approx(sent, rel=1e-6)
        assert link.use <= 1 + 1e-6


def test_a_node_of_ones_own_is_named_like_no_other() -> None:
    document = cluster((H100, 1), (A100, 1)).document()
    prices = []
    for names in (("n0", "n1"), ("one-more", "one-more-more")):
        for node, name in zip(document["nodes"], names, strict=True):
            node["name"] = name
        plan = schedule(problem(parse_cluster(document, "test cluster")), shadow=True)
        prices.append([price for price in plan.shadow_prices if price.kind == "gpu"])
    assert prices[0]
    gains = [[price.gain_rps for price in found] for found in prices]
    assert gains[1] == pytest.approx(gains[0])
