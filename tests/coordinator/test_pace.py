"""How fast requests end, by what was seen while somebody waited."""

from __future__ import annotations

import pytest

from hexgen2.coordinator.pace import Pace


def ended(pace: Pace, at: float, seconds: int, rate: int, waits: bool) -> float:
    """So many requests per second end from `at` on; until when."""
    pace.note(at, waits)
    for tick in range(1, seconds * rate + 1):
        pace.note(at + tick / rate, waits, ended=1)
    return at + seconds


def test_nothing_is_known_while_nobody_waits() -> None:
    pace = Pace()
    assert pace.seconds_for(5, ended(pace, 0.0, 50, 4, waits=False)) == 0.0


def test_the_rate_while_somebody_waits() -> None:
    pace = Pace()
    now = ended(pace, 0.0, 50, 4, waits=True)
    assert pace.seconds_for(8, now) == pytest.approx(2.0, rel=0.05)
    now = ended(pace, now, 5, 1, waits=False)  # fewer come: no slower for that
    assert pace.seconds_for(8, now) == pytest.approx(2.0, rel=0.05)


def test_requests_that_end_faster_while_nobody_waits_count() -> None:
    """Else a slow hour would be held against the quick requests that come after it."""
    pace = Pace()
    now = ended(pace, 0.0, 50, 1, waits=True)
    now = ended(pace, now, 15, 20, waits=False)
    assert pace.seconds_for(20, now) == pytest.approx(1.3, rel=0.1)


def test_it_is_forgotten() -> None:
    pace = Pace()
    now = ended(pace, 0.0, 50, 4, waits=True)
    assert pace.seconds_for(8, now + 100.0) == 0.0


def test_a_burst_is_no_stall() -> None:
    """64 requests come at once, each takes 3 s, and from then on eight end per second."""
    pace = Pace()
    pace.note(0.0, waits=True)
    for tick in range(40):
        now = 3.0 + tick / 8
        pace.note(now, waits=True, ended=1)
        assert pace.seconds_for(64, now) <= 1.3 * 64 / 8
    assert pace.seconds_for(64, now) == pytest.approx(64 / 8, rel=0.05)


def test_a_stall_is_one() -> None:
    pace = Pace()
    now = ended(pace, 0.0, 20, 4, waits=True)
    assert pace.seconds_for(8, now + 10.0) > 2.5 * 8 / 4
