from __future__ import annotations

from itertools import chain, combinations

from hypothesis import given
from hypothesis import strategies as st

from hexgen2.probe.tournament import rounds


@given(st.integers(0, 40))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count: int) -> None:
    found = rounds(range(count))
    met = [frozenset(pair) for pair in chain(*found)]
    assert sorted(met, key=sorted) == sorted(map(frozenset, combinations(range(count), 2)), key=sorted)
    for pairs in found:
        players = list(chain(*pairs))
        assert len(players) == len(set(players))
    assert len(found) <= count - 1 + count % 2 or count == 0
