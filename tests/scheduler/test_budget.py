"""`budget`: prices and counts are kept, more money never buys less, and a rate is really reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from hexgen2.scheduler import budget as module
from hexgen2.scheduler.budget import Asked, budget
from hexgen2.scheduler.mixes import MIP_GAP, Market, Wanted
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.schedule import schedule
from hexgen2.specs import InputError
from hexgen2.specs.offers import Offers, parse_offers
from tests.scheduler.support import A100, A6000, H100, L40, LARGE, lengths, problem

PRICES = {H100: 3.7, A100: 1.7, L40: 1.1, A6000: 0.8}
LOAD = lengths(count=8)


def shop(*offers: tuple[str, int, int, float], gbps: float = 25.0) -> Offers:
    """Offers o0, o1, … of (GPU type, GPUs per node, available nodes, USD per GPU and hour)."""
    return parse_offers(
        {
            "name": "shop",
            "offers": [
                {"name": f"o{k}", "gpu": gpu, "count": count, "available": most, "price_per_gpu_hour": price}
                for k, (gpu, count, most, price) in enumerate(offers)
            ],
            "network": {"default": {"gbps": gbps, "latency_ms": 0.2}},
        },
        "shop.yaml",
    )


def question(offers: Offers, **more: object) -> Problem:
    return problem(offers.cluster([1] * len(offers.offers)), load=LOAD, source="shop.yaml", **more)


@st.composite
def shops(draw: st.DrawFn) -> Offers:
    kinds = draw(st.lists(st.sampled_from(sorted(PRICES)), min_size=1, max_size=3, unique=True))
    return shop(
        *(
            (
                gpu,
                draw(st.sampled_from([1, 2])),
                draw(st.integers(1, 2)),
                PRICES[gpu] * draw(st.sampled_from([0.5, 1, 2])),
            )
            for gpu in kinds
        ),
        gbps=draw(st.sampled_from([1.0, 25.0])),
    )


def market(offers: Offers) -> Market:
    return module._market(question(offers), offers, Asked(hourly=1e6))


@given(shops(), st.lists(st.floats(0.5, 20), min_size=2, max_size=4), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_the_program_keeps_price_and_counts_and_never_serves_less_for_more(
    offers: Offers, prices: list[float], most_gpus: int
) -> None:
    where = market(offers)
    last = 0.0
    for hourly in sorted(prices):
        found = where.best(Wanted(hourly=hourly, gpus=most_gpus))
        if found is None:
            assert last == 0
            continue
        assert offers.price(found.mix) == pytest.approx(found.price)
        assert found.price <= hourly * (1 + 1e-6)
        assert offers.gpus(found.mix) <= most_gpus
        assert all(n <= o.available for n, o in zip(found.mix, offers.offers, strict=True))
        assert found.rps <= found.bound * (1 + 1e-6)
        assert found.bound >= last * (1 - 1e-6)
        last = found.rps


@given(shops())
@settings(max_examples=10, deadline=None)
def test_the_program_is_right_about_which_mix_is_best(offers: Offers) -> None:
    """Against every mix by itself: the best rate for a price, and the lowest price for a rate."""
    where = market(offers)
    values = {}
    for mix in product(*(range(o.available + 1) for o in offers.offers)):
        found = where.best(Wanted(most=mix))
        if found is not None:
            values[mix] = found.rps
    dearest = max(map(offers.price, values), default=0.0)
    for part in (0.3, 0.6, 1.0):
        affordable = {mix: rps for mix, rps in values.items() if offers.price(mix) <= dearest * part + 1e-9}
        found = where.best(Wanted(hourly=dearest * part))
        best = max(affordable.values(), default=0.0)
        # The prices may take MIP_GAP of the largest template's rate, the tolerance as much of the optimum.
        slack = MIP_GAP * (best + max((c.rps for c in where.columns), default=0.0))
        assert (found.rps if found else 0.0) == pytest.approx(best, abs=slack + 1e-9)
        if best > 0:
            # Rates are known to the tolerance: a mix within it of the rate that was asked may count or not.
            least, most = (
                min(offers.price(mix) for mix, rps in values.items() if rps >= best / 2 * part)
                for part in (1 - 2 * MIP_GAP, 1 + 2 * MIP_GAP)
            )
            found = where.best(Wanted(rate=best / 2))
            assert found is not None
            assert least * (1 - 2 * MIP_GAP) <= found.price <= most * (1 + 2 * MIP_GAP)


@contextmanager
def no_answer(*reasons: str) -> Iterator[None]:
    """Another example is taken where there is no answer for one of these reasons."""
    try:
        yield
    except InputError as error:
        if any(reason in str(error) for reason in reasons):
            reject()
        raise


@given(shops(), st.sampled_from([2.5, 5.0, 9.0]))
@settings(max_examples=4, deadline=None)
def test_an_answer_for_a_price_keeps_it_and_its_frontier_never_falls(offers: Offers, hourly: float) -> None:
    with no_answer("rent nothing", "holds"):
        answer = budget(question(offers), offers, Asked(hourly=hourly, max_gpus=4))
    assert answer.best.price <= hourly * (1 + 1e-9)
    for rented in (answer.best, *answer.frontier, *(one.best for one in answer.alone if one.best)):
        assert offers.gpus(rented.mix) <= 4
        assert all(n <= o.available for n, o in zip(rented.mix, offers.offers, strict=True))
        assert rented.price == pytest.approx(rented.plan.cluster.price_per_hour)
    for cheaper, dearer in pairwise(answer.frontier):
        assert cheaper.price < dearer.price
        assert cheaper.rps < dearer.rps
    assert all(found.rps <= answer.best.rps * (1 + 1e-9) for found in answer.frontier if found.price <= hourly)


@given(shops(), st.sampled_from([0.5, 3.0, 8.0]))
@settings(max_examples=4, deadline=None)
def test_an_answer_for_a_rate_reaches_it_for_no_less_than_the_program_allows(
    offers: Offers, rate: float
) -> None:
    with no_answer("--rate", "holds"):
        answer = budget(question(offers), offers, Asked(rate=rate))
    again = schedule(problem(answer.best.plan.cluster, load=LOAD))
    assert again.objective.value >= rate * (1 - 1e-9)
    assert answer.best.price >= answer.bound * (1 - MIP_GAP)
    reached = [one.best.price for one in answer.alone if one.best is not None and one.best.rps >= rate]
    assert all(answer.best.price <= price * (1 + 1e-9) for price in reached)


def test_the_best_of_all_mixes_is_found_where_all_can_be_planned() -> None:
    offers = shop((H100, 1, 1, 3.7), (A100, 1, 1, 1.7), (A6000, 2, 1, 0.8))
    asked = question(offers)
    planned = {}
    for mix in product(*(range(o.available + 1) for o in offers.offers)):
        if any(mix):
            planned[mix] = schedule(problem(offers.cluster(mix), load=LOAD)).objective.value
    for hourly in (1.6, 3.5, 6.0):
        best = max(rps for mix, rps in planned.items() if offers.price(mix) <= hourly)
        assert budget(asked, offers, Asked(hourly=hourly)).best.rps >= 0.98 * best


def test_mixing_can_beat_every_single_type() -> None:
    """One H100 and one A100 to be had: together they serve more than either."""
    offers = shop((H100, 1, 1, 3.0), (A100, 1, 1, 1.5))
    answer = budget(question(offers), offers, Asked(hourly=5))
    assert answer.best.mix == (1, 1)
    assert {one.gpu for one in answer.alone} == {H100, A100}
    assert all(one.best is not None and one.best.rps < answer.best.rps for one in answer.alone)


def test_of_own_hardware_no_more_is_taken_than_the_rate_needs() -> None:
    offers = shop((A6000, 1, 4, 0.0), (H100, 1, 1, 3.0))
    alone = budget(question(offers), offers, Asked(hourly=0.01, max_gpus=1)).best
    assert alone.mix == (1, 0)
    answer = budget(question(offers), offers, Asked(rate=0.9 * alone.rps))
    assert answer.best.mix == (1, 0)
    assert answer.best.price == answer.bound == pytest.approx(0, abs=1e-5)


def test_no_cluster_is_larger_than_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_GPUS", 3)
    offers = shop((A6000, 2, 8, 0.8), (L40, 1, 8, 1.1))
    answer = budget(question(offers), offers, Asked(hourly=100))
    assert all(offers.gpus(rented.mix) <= 3 for rented in (answer.best, *answer.frontier))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (
            Asked(hourly=0.1),
            "--hourly: 0.1 USD rent nothing of shop.yaml that holds small-16b; give at least 1.60",
        ),
        (Asked(rate=1e4), "--rate: 10000 requests/s are more than the GPUs of shop.yaml that can be had serve"),
    ],
)
def test_what_cannot_be_had_is_one_line_that_says_what_can(asked: Asked, line: str) -> None:
    offers = shop((H100, 1, 1, 3.0), (A6000, 2, 2, 0.8))
    with pytest.raises(InputError) as caught:
        budget(question(offers), offers, asked)
    assert str(caught.value).startswith(line)


def test_a_model_that_nothing_holds_is_said_so() -> None:
    offers = shop((A6000, 1, 1, 0.8))
    with pytest.raises(InputError, match="no mix of them holds large-70b"):
        budget(question(offers, model=LARGE), offers, Asked(hourly=100))


def test_the_same_question_has_the_same_answer() -> None:
    offers = shop((H100, 1, 1, 3.0), (A6000, 2, 1, 0.8))
    first, second = (budget(question(offers), offers, Asked(hourly=6), seed=3) for _ in range(2))
    assert [(r.mix, r.rps) for r in first.frontier] == [(r.mix, r.rps) for r in second.frontier]
    documents = [{**answer.best.plan.document(), "wall_s": 0} for answer in (first, second)]
    assert documents[0] == documents[1]
