"""How fast requests end while others wait for their places."""

from __future__ import annotations

import math

_MEMORY_S = 10.0
_FORGOTTEN = 0.1
"""Requests remembered below which, when somebody waits again, what was before is not counted any more."""
_KNOWN = 2.0
"""Requests remembered from which on their rate counts."""


class Pace:
    """Requests that end per second while somebody waits, those longer ago counted for less.

    While nobody waits requests end as fast as they come, which says nothing of how fast they could be served:
    that time does not count, unless they end faster then. Nor does the time until the first one ends: those
    that came with it are still on their way, and a burst would look like a stall.
    """

    def __init__(self) -> None:
        self._ended = 0.0
        self._over_s = 0.0  # in which they ended
        self._lately = 0.0  # requests that ended, whether somebody waited or not
        self._at = 0.0
        self._waits = False
        self._runs = False  # one has ended since somebody waits

    def note(self, now: float, waits: bool, ended: int = 0) -> None:
        """`waits`: whether somebody waits from now (seconds) on; `ended`: requests that ended just now."""
        keep = math.exp((self._at - now) / _MEMORY_S)
        self._ended *= keep
        self._over_s *= keep
        self._lately = self._lately * keep + ended
        if self._waits and self._runs:
            self._ended += ended
            self._over_s += _MEMORY_S * (1 - keep)
        elif self._waits:
            self._runs = ended > 0
        elif waits and self._ended < _FORGOTTEN:
            self._ended = self._over_s = 0.0
            self._runs = False
        self._at, self._waits = now, waits

    def seconds_for(self, count: int, now: float) -> float:
        """How long so many requests take to end; 0 where that is not known.

        >>> pace = Pace()
        >>> pace.note(0.0, waits=True)
        >>> for second in range(1, 100):
        ...     pace.note(second, waits=True, ended=2)
        >>> 4.0 < pace.seconds_for(9, 99.0) < 5.0
        True
        """
        self.note(now, self._waits)
        if self._ended < _KNOWN:
            return 0.0
        return count * min(self._over_s / self._ended, _MEMORY_S / self._lately)
