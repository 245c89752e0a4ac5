"""Routing is pure: the shares are kept in the long run, load bends them a bounded way."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.specs.routing import Path, SmoothRouter, load_factor

shares = st.lists(st.integers(1, 100), min_size=1, max_size=8).map(lambda w: [x / sum(w) for x in w])
loads = st.dictionaries(st.sampled_from([f"d{i}" for i in range(8)]), st.floats(0, 50), max_size=8)


def paths(weights: list[float]) -> list[Path]:
    return [Path(f"p{index % 3}", f"d{index}", share) for index, share in enumerate(weights)]


def everywhere(_: Path) -> bool:
    return True


@given(shares, st.integers(1, 400))
def test_every_run_of_requests_keeps_the_shares(weights: list[float], count: int) -> None:
    """Without load a path is never more than one request for each other path away from its share."""
    router = SmoothRouter(paths(weights), 0.5)
    taken = Counter(router.choose(everywhere, {}) for _ in range(count))
    for path in router.paths:
        assert abs(taken[path] - path.share * count) <= len(weights)


@given(shares, loads, st.floats(0, 0.9))
@settings(max_examples=60)
def test_load_bends_shares_no_further_than_stated(
    weights: list[float], load: dict[str, float], bound: float
) -> None:
    router = SmoothRouter(paths(weights), bound)
    count = 600
    taken = Counter(router.choose(everywhere, load) for _ in range(count))
    for path in router.paths:
        # All others at the far end of the bound, this one at the near end, and the other way round.
        low = path.share * (1 - bound) / (path.share * (1 - bound) + (1 - path.share) / (1 - bound))
        high = path.share / (1 - bound) / (path.share / (1 - bound) + (1 - path.share) * (1 - bound))
        slack = len(weights) / count
        assert low - slack <= taken[path] / count <= high + slack


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 0.95))
def test_load_factor_is_bounded_and_falls_with_load(load: float, mean: float, bound: float) -> None:
    factor = load_factor(load, mean, bound)
    assert 1 - bound <= factor <= 1 / (1 - bound)
    assert factor >= load_factor(load + 1, mean, bound)


@given(shares, st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=60))
def test_only_available_paths_are_taken(weights: list[float], down: list[set[int]]) -> None:
    router = SmoothRouter(paths(weights), 0.5)
    for out in down:
        names = {f"d{index}" for index in out}
        path = router.choose(lambda p, names=names: p.target not in names, {})  # type: ignore[misc]
        if path is None:
            assert {p.target for p in router.paths} <= names
        else:
            assert path.target not in names


@given(shares, st.integers(1, 50))
def test_a_path_that_comes_back_is_not_flooded(weights: list[float], away: int) -> None:
    router = SmoothRouter(paths(weights), 0.5)
    first = router.paths[0]
    for _ in range(away):
        router.choose(lambda p: p != first, {})
    taken = [router.choose(everywhere, {}) for _ in range(20)]
    assert taken.count(first) <= first.share * 20 + len(weights)


def test_the_same_calls_give_the_same_choices() -> None:
    one, two = (SmoothRouter(paths([0.5, 0.3, 0.2]), 0.5) for _ in range(2))
    load = {"d0": 2.0, "d2": 0.1}
    assert [one.choose(everywhere, load) for _ in range(99)] == [
        two.choose(everywhere, load) for _ in range(99)
    ]


def test_shares_come_without_bursts() -> None:
    router = SmoothRouter(paths([0.75, 0.25]), 0.5)
    order = [router.choose(everywhere, {}) for _ in range(8)]
    assert [path.target for path in order if path] == ["d0", "d0", "d1", "d0"] * 2


@pytest.mark.parametrize(("busy", "idle"), [("d0", "d1"), ("d1", "d0")])
def test_the_less_loaded_path_gets_more(busy: str, idle: str) -> None:
    router = SmoothRouter(paths([0.5, 0.5]), 0.5)
    taken = Counter(
        path.target for path in (router.choose(everywhere, {busy: 3.0}) for _ in range(300)) if path
    )
    assert taken[idle] > 1.5 * taken[busy]


@pytest.mark.parametrize("shares", [[1.0], [0.7, 0.3], [0.574, 0.166, 0.213, 0.047]])
def test_idle_counts_stay_within_one_of_the_shares(shares: list[float]) -> None:
    router = SmoothRouter(paths(shares), 0.5)
    counts: Counter[Path | None] = Counter()
    for total in range(1, 1001):
        counts[router.choose(everywhere, {})] += 1
        for path in router.paths:
            assert abs(counts[path] - path.share * total) <= 1.0 + 1e-6
