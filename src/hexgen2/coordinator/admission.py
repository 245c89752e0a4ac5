"""Who may be served now, who waits, and who is refused: bounded, so that overload costs others nothing.

As many requests run as the plan's engines hold at once; a bounded number waits; the rest is refused at once
with the time after which it is worth trying again. Waiting requests are taken by priority (vLLM's: lower
first), then in order; long prompts wait in a line of their own, from which every fourth place is filled
while short ones wait too, so that neither kind starves the other.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hexgen2.coordinator.errors import ApiError

_LONG_EVERY = 4
_RATE_MEMORY_S = 10.0


@dataclass(frozen=True)
class AdmissionLimits:
    """`queue`: requests that may wait; `wait_s`: for how long; `per_key`: running and waiting ones of one key;
    `long_bytes`: bodies above it count as long."""

    queue: int
    wait_s: float
    per_key: int | None
    long_bytes: int


@dataclass(order=True)
class _Waiting:
    priority: int
    number: int
    place: asyncio.Future[None] = field(compare=False)


class Admission:
    """`capacity()` is asked anew whenever a place may be free: it follows the engines that are up."""

    def __init__(self, capacity: Callable[[], int], limits: AdmissionLimits) -> None:
        self._capacity = capacity
        self._limits = limits
        self._lines: tuple[list[_Waiting], list[_Waiting]] = ([], [])  # short, long
        self._numbers = itertools.count()
        self._short_in_a_row = 0
        self._per_key: Counter[str] = Counter()
        self._ended = 0.0  # requests that ended lately, those longer ago counted for less
        self._ended_at = 0.0
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._lines[0]) + len(self._lines[1])

    def expected_wait_s(self) -> float:
        """How long the last in line will wait, by how fast requests have been ending lately."""
        return (self.waiting + 1) * _RATE_MEMORY_S / self._ended if self._ended >= 1.0 else 0.0

    def refuse_early(self, key: str) -> None:
        """ApiError where a request has no chance: cheap, and asked before its body is read."""
        if self._limits.per_key is not None and self._per_key[key] >= self._limits.per_key:
            raise _refused("This API key has as many requests in progress as it may have.", self._retry_after())
        if self.running >= self._capacity() > 0 and (
            self.waiting >= self._limits.queue or self.expected_wait_s() > self._limits.wait_s
        ):
            raise _refused("The service is at its capacity and its queue is full.", self._retry_after())

    @asynccontextmanager
    async def admitted(self, key: str, size_bytes: int, priority: int) -> AsyncIterator[None]:
        """Hold a place inside the block, after waiting for one; ApiError where none comes free in time."""
        self.refuse_early(key)
        self._per_key[key] += 1
        try:
            await self._enter(size_bytes, priority)
            try:
                yield
            finally:
                self._leave()
        finally:
            self._per_key[key] -= 1
            if not self._per_key[key]:
                del self._per_key[key]

    async def _enter(self, size_bytes: int, priority: int) -> None:
        capacity = self._capacity()
        # With no engine up (capacity 0) nobody waits: the request fails with its own clear error.
        if capacity <= 0 or (self.running < capacity and not self.waiting):
            self.running += 1
            return
        place = asyncio.get_running_loop().create_future()
        line = self._lines[size_bytes > self._limits.long_bytes]
        waiting = _Waiting(priority, next(self._numbers), place)
        heapq.heappush(line, waiting)
        self._fill()
        try:
            async with asyncio.timeout(self._limits.wait_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self._leave()  # the place was given at the very moment the wait ended
            else:
                line.remove(waiting)
                heapq.heapify(line)
            if isinstance(error, TimeoutError):
                raise _refused("No place came free in time.", self._retry_after()) from None
            raise

    def _leave(self) -> None:
        self.running -= 1
        now = asyncio.get_running_loop().time()
        self._ended = self._ended * math.exp((self._ended_at - now) / _RATE_MEMORY_S) + 1.0
        self._ended_at = now
        self._fill()

    def _fill(self) -> None:
        """Give free places to who waits."""
        while self.waiting and (self.running < self._capacity() or self._capacity() <= 0):
            short, long = self._lines
            take_long = bool(long) and (not short or self._short_in_a_row >= _LONG_EVERY - 1)
            self._short_in_a_row = 0 if take_long else self._short_in_a_row + 1
            place = heapq.heappop(long if take_long else short).place
            if not place.done():
                self.running += 1
                place.set_result(None)

    def _retry_after(self) -> float:
        return min(max(1.0, self.expected_wait_s()), 60.0)


def _refused(message: str, retry_after_s: float) -> ApiError:
    return ApiError(
        429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s
    )
