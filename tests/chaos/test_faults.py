"""The schedule of outages: the same for a seed, everybody's turn comes, and the fleet is never all out."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.faults import FaultRates, outages

ROLES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.sampled_from(["prefill", "decode"]), min_size=1, max_size=12
)


@given(st.integers(0, 2**32), ROLES)
def test_a_seed_gives_one_schedule(seed: int, roles: dict[str, str]) -> None:
    first, second = (list(itertools.islice(outages(seed, roles, FaultRates()), 30)) for _ in range(2))
    assert first == second
    assert [outage.at_s for outage in first] == sorted(outage.at_s for outage in first)


@given(st.integers(0, 2**32), ROLES, st.floats(0.1, 0.9))
def test_enough_of_each_role_stays(seed: int, roles: dict[str, str], part: float) -> None:
    schedule = list(itertools.islice(outages(seed, roles, FaultRates(out_at_once=part)), 60))
    for now in schedule:
        out = [o.group for o in schedule if o.at_s <= now.at_s < o.at_s + o.for_s]
        assert len(out) == len(set(out)), "an engine that is out is not hit again"
        for role in set(roles.values()):
            peers = sum(other == role for other in roles.values())
            assert sum(roles[group] == role for group in out) <= max(1, int(part * peers))


@given(st.integers(0, 2**32), ROLES)
def test_every_engine_falls(seed: int, roles: dict[str, str]) -> None:
    schedule = itertools.islice(outages(seed, roles, FaultRates()), 20 * len(roles))
    assert {outage.group for outage in schedule} == set(roles)
