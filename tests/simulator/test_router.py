"""The simulator's choice of paths is the coordinator's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.coordinator import routing as coordinator
from hexgen2.simulator.routing import Path, Router


@given(
    shares=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6).filter(any),
    bound=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_the_same_choices_as_the_coordinator(shares: list[float], bound: float, seed: int) -> None:
    names = [(f"p{n % 2}" if n % 3 else None, f"d{n}", share) for n, share in enumerate(shares)]
    ours = Router([Path(*name) for name in names], bound)
    theirs = coordinator.SmoothRouter([coordinator.Path(*name) for name in names], bound)
    rng = np.random.default_rng(seed)
    groups = {group for path in ours.paths for group in path.groups}
    for _ in range(60):
        load = {group: float(rng.random() * 2) for group in sorted(groups)}
        found, expected = ours.choose(load), theirs.choose(lambda _: True, load)
        assert expected is not None
        assert (found.prefill, found.target) == (expected.prefill, expected.target)


@pytest.mark.parametrize("shares", [[1.0], [0.7, 0.3], [0.574, 0.166, 0.213, 0.047]])
def test_counts_stay_within_one_of_the_shares(shares: list[float]) -> None:
    router = Router([Path(None, f"c{n}", share) for n, share in enumerate(shares)])
    load = {f"c{n}": 0.0 for n in range(len(shares))}
    counts = dict.fromkeys(load, 0)
    for total in range(1, 1001):
        counts[router.choose(load).target] += 1
        for n, share in enumerate(shares):
            assert abs(counts[f"c{n}"] - share * total) <= 1.0 + 1e-6
