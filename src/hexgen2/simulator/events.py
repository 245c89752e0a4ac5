"""The event queue: what happens next, in order of time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Protocol


class Clock(Protocol):
    """Calls functions at times to come: simulated ones here, real ones in the emulator."""

    @property
    def now(self) -> float: ...

    def at(self, time: float, call: Callable[[Any], None], argument: Any = None) -> None: ...


class Events:
    """Calls functions at their times; those of equal time in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._count = 0

    def at(self, time: float, call: Callable[[Any], None], argument: Any = None) -> None:
        """Call ``call(argument)`` at ``time`` seconds, now at the earliest."""
        self._count += 1
        heappush(self._heap, (max(time, self.now), self._count, call, argument))

    def step(self) -> bool:
        """Go to the next event; False when there is none."""
        if not self._heap:
            return False
        self.now, _, call, argument = heappop(self._heap)
        call(argument)
        return True
