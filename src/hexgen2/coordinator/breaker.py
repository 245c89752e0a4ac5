"""Circuit breaking by outcome: who fails request after request is left alone for a while, then tried once.
Pure.

Health checks see dead engines; a breaker sees those that answer /health and fail every request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BreakerSettings:
    """`failures` in a row open it, for `open_s` at first and twice as long after each trial that fails."""

    failures: int
    open_s: float
    max_open_s: float


class Breaker:
    """Closed: requests pass. Open: none do. Half open: one does, and its outcome decides."""

    __slots__ = ("_failures", "_open_for", "_open_until", "_settings", "_trial_until")

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._failures = 0
        self._open_for = 0.0  # 0: closed
        self._open_until = 0.0
        self._trial_until = 0.0

    def state(self, now: float) -> Literal["closed", "open", "half_open"]:
        if not self._open_for:
            return "closed"
        return "open" if now < self._open_until else "half_open"

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        return not self._open_for or now >= max(self._open_until, self._trial_until)

    def sent(self, now: float) -> None:
        """A request was sent. While half open it is the trial, and others wait for it, though not for ever: its
        client may leave, and then it has no outcome."""
        if self._open_for and now >= self._open_until:
            self._trial_until = now + self._open_for

    def succeeded(self) -> None:
        self._failures = 0
        self._open_for = 0.0

    def failed(self, now: float) -> bool:
        """Count a failure; True where it opens the breaker."""
        if self._open_for:
            if now < self._open_until:
                return False  # the request was sent before the breaker opened: it tells nothing new
            self._open_for = min(2 * self._open_for, self._settings.max_open_s)
        else:
            self._failures += 1
            if self._failures < self._settings.failures:
                return False
            self._open_for = self._settings.open_s
        self._open_until = now + self._open_for
        self._trial_until = 0.0
        return True
