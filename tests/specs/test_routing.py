"""Routing is pure: the shares are kept in the long run, load bends them a bounded way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.specs.routing import Path, SmoothRouter, engine_load, load_factor

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


def only(targets: set[str]) -> Callable[[Path], bool]:
    """Whether a path leads to one of these."""
    return lambda path: path.target in targets


def all_but(targets: set[str]) -> Callable[[Path], bool]:
    """Whether a path leads elsewhere."""
    return lambda path: path.target not in targets


@given(shares, st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=60))
def test_only_available_paths_are_taken(weights: list[float], down: list[set[int]]) -> None:
    router = SmoothRouter(paths(weights), 0.5)
    for out in down:
        names = {f"d{index}" for index in out}
        path = router.choose(all_but(names), {})
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


@given(
    shares,
    st.floats(0, 9),
    st.lists(st.frozensets(st.integers(0, 7), max_size=4), min_size=1, max_size=400),
)
def test_preferences_leave_the_shares_no_further_than_stated(
    weights: list[float], slack: float, wishes: list[frozenset[int]]
) -> None:
    """Whatever is preferred, and in whatever order: no path is ever more than ``slack`` ahead of its share."""
    router = SmoothRouter(paths(weights), 0.5, slack)
    ahead = max(1.0, slack) + 1e-6
    counts: Counter[Path | None] = Counter()
    for total, wish in enumerate(wishes, 1):
        prefer = {path for index, path in enumerate(router.paths) if index in wish}
        counts[router.choose(everywhere, {}, prefer)] += 1
        for path in router.paths:
            assert counts[path] - path.share * total <= ahead
            assert path.share * total - counts[path] <= ahead * (len(weights) - 1)


def test_a_preferred_path_is_taken_until_it_is_ahead() -> None:
    router = SmoothRouter(paths([0.5, 0.5]), 0.5, slack=3)
    first, second = router.paths
    taken = [router.choose(everywhere, {}, {second}) for _ in range(20)]
    assert taken[:5] == [second] * 5  # 5 of 5 are 2.5 ahead of the half, a sixth would be 3
    assert 0.5 * 20 <= taken.count(second) <= 0.5 * 20 + 3
    assert first in taken


def test_a_preference_for_what_is_not_available_changes_nothing() -> None:
    liking, plain = (SmoothRouter(paths([0.5, 0.3, 0.2]), 0.5, slack=5) for _ in range(2))
    gone = liking.paths[2]
    for _ in range(30):
        chosen = liking.choose(lambda path: path != gone, {}, {gone})
        assert chosen == plain.choose(lambda path: path != gone, {})


@given(st.integers(1, 500), st.floats(0, 1000), st.floats(0, 1))
def test_an_engine_is_as_loaded_as_its_scarcer_half(max_batch: int, placed: float, used: float) -> None:
    assert engine_load(placed, max_batch, used) >= max(used, placed / max_batch) - 1e-12


@given(shares, st.lists(st.sets(st.integers(0, 7), min_size=1), min_size=1, max_size=300), st.floats(0, 6))
def test_credits_stay_bounded_whoever_has_a_place(
    weights: list[float], turns: list[set[int]], slack: float
) -> None:
    """Paths that are up keep what they have earned while they have no place; it cannot pile up."""
    router = SmoothRouter(paths(weights), 0.5, slack)
    for free in turns:
        names = {f"d{index}" for index in free}
        prefer = {router.paths[min(free) % len(router.paths)]}
        router.choose(only(names), {}, prefer, everywhere)
        assert max(map(abs, router._credit)) <= (1 + slack) * len(weights)


def test_routes_to_one_engine_keep_their_proportions_with_one_place_free_at_a_time() -> None:
    """At saturation the engines that answer take turns in having a place."""
    pairs = [("p0", "d0", 0.35), ("p1", "d0", 0.15), ("p0", "d1", 0.2), ("p1", "d1", 0.3)]
    router = SmoothRouter([Path(*pair) for pair in pairs], 0.5)
    taken: Counter[Path | None] = Counter()
    for turn in range(400):
        taken[router.choose(only({f"d{turn % 2}"}), {}, (), everywhere)] += 1
    assert [taken[path] for path in router.paths] == [140, 60, 80, 120]
