"""A bounded number at once; whoever comes later waits, by priority and then in order."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(order=True)
class _Waiting:
    priority: int
    number: int
    turn: asyncio.Future[None] = field(compare=False)


class Gate:
    """Before the second leg: a decode engine is sent no more KV caches than it has slots.

    vLLM counts a request whose cache is on its way, or is there and waits, only when it runs. A backlog sent at
    once would fill its memory, and sequences that run would lose their blocks.
    """

    def __init__(self, limit: int, is_open: Callable[[], bool] = lambda: True) -> None:
        self.limit = limit
        self._is_open = is_open
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self.inside = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_free(self) -> bool:
        """Whether whoever comes now is let in at once."""
        return not self._waiting and self.inside < self.limit and (self.inside == 0 or self._is_open())

    @asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        """Hold a place inside the block, after waiting for one."""
        await self._enter(priority)
        try:
            yield
        finally:
            self.inside -= 1
            self.refill()

    def refill(self) -> None:
        """Let in who waits, as far as there is room. The first is let in whatever `is_open` says: with nobody
        inside it could not change."""
        while self._waiting and self.inside < self.limit and (self.inside == 0 or self._is_open()):
            turn = heapq.heappop(self._waiting).turn
            if not turn.done():
                self.inside += 1
                turn.set_result(None)

    def fail_waiting(self, error: Callable[[], Exception]) -> None:
        """End every wait with an error of its own."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.turn.done():
                one.turn.set_exception(error())

    async def _enter(self, priority: int) -> None:
        if not self._waiting and self.inside < self.limit and (self.inside == 0 or self._is_open()):
            self.inside += 1
            return
        one = _Waiting(priority, next(self._numbers), asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, one)
        try:
            await one.turn
        except BaseException:
            if one in self._waiting:
                self._waiting.remove(one)
                heapq.heapify(self._waiting)
            elif one.turn.done() and not one.turn.cancelled() and one.turn.exception() is None:
                self.inside -= 1  # the turn came at the very moment the wait ended
                self.refill()
            raise
