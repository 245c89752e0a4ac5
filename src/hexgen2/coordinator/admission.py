"""Who may be served now, who waits, and who is refused: bounded, so that overload costs others nothing.

A request is let in when an engine that may answer it has a place; until then it waits, before anything of it is
computed. So does one that comes while no path is up but an engine may be coming up. A bounded number waits; the
rest is refused at once with the time after which it is worth trying again. Waiting requests are taken by
priority (vLLM's: lower first), then in order; long prompts wait in a line of their own. Long ones take several
places each, by their length, and the two lines are served by the places that they have had (start-time fair
queueing, Goyal et al. 1996), three to the short ones for one to the long ones: so neither kind starves the
other, however many of either come.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from hexgen2.coordinator.errors import ApiError, no_path
from hexgen2.coordinator.fleet import Place, Want
from hexgen2.coordinator.pace import Pace

# The part of the places that each line gets while both wait: the short ones, the long ones.
_LINE_SHARES = (3.0, 1.0)
# Nobody is let into a queue that takes longer than this part of the time one may wait: the estimate is rough
# (requests end in bursts), and who waits in vain is told late what could have been told at once.
_SURE = 0.7
_NEW = 0.05
"""Weight of the last request in the mean time that requests hold their places."""


@dataclass(frozen=True)
class AdmissionLimits:
    """`queue`: requests that may wait; `wait_s`: for how long; `per_key`: those of one key."""

    queue: int
    wait_s: float
    per_key: int | None


class Room(Protocol):
    """Where requests are placed: the fleet."""

    @property
    def full(self) -> bool:
        """Whether no place is left anywhere."""
        ...

    @property
    def unanswered(self) -> int:
        """Requests that have a place, and whose first leg is not over or whose second one waits to begin."""
        ...

    def lane(self, want: Want) -> Hashable:
        """Requests of one lane can use the same places: where the first finds none, no other does."""
        ...

    def place(self, want: Want) -> Place | None:
        """A place, None where there is none now; ApiError where waiting would not help."""
        ...

    def patience_s(self, want: Want) -> float | None:
        """How long a request may wait, where nothing that may serve it is up; None where something is."""
        ...


@dataclass(order=True)
class _Waiting:
    priority: int
    number: int
    want: Want = field(compare=False)
    given: asyncio.Future[Place] = field(compare=False)


class _Line:
    """Waiting requests by lane, each lane by priority and then in order."""

    def __init__(self) -> None:
        self.lanes: dict[Hashable, list[_Waiting]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, lane: Hashable, one: _Waiting) -> None:
        heapq.heappush(self.lanes.setdefault(lane, []), one)
        self._count += 1

    def remove(self, lane: Hashable, one: _Waiting) -> None:
        """Harmless where it is not there any more."""
        heap = self.lanes.get(lane, [])
        if heap and heap[0] is one:
            heapq.heappop(heap)
        elif one in heap:
            heap.remove(one)
            heapq.heapify(heap)
        else:
            return
        self._count -= 1
        if not heap:
            del self.lanes[lane]

    def heads(self) -> list[tuple[_Waiting, Hashable]]:
        """The first of each lane, the one whose turn it is first."""
        return sorted(((heap[0], lane) for lane, heap in self.lanes.items()), key=lambda head: head[0])


class Admission:
    """The door. Whoever gives places back, or brings engines up, calls `refill`."""

    def __init__(self, room: Room, limits: AdmissionLimits) -> None:
        self._room = room
        self._limits = limits
        self._lines = (_Line(), _Line())  # short, long
        self._served = [0.0, 0.0]  # places that each line has had, over its share
        self._numbers = itertools.count()
        self._per_key: Counter[str] = Counter()
        self._pace = Pace()
        self._stay_s = 0.0  # of a request with a place, in the mean of the last ones
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._lines[0]) + len(self._lines[1])

    def expected_wait_s(self) -> float:
        """Seconds until the last in line is answered, by how fast requests end while some wait. Those that have
        been let in and that no engine answers yet are before it."""
        count = self.waiting + 1 + self._room.unanswered
        # Until one has ended while others waited: by how long requests hold their places (Little's law).
        first = count * self._stay_s / self.running if self.running else 0.0
        return self._pace.seconds_for(count, _now()) or first

    def refuse_early(self, key: str) -> None:
        """ApiError where a request has no chance: cheap, and asked before its body is read."""
        if self._limits.per_key is not None and self._per_key[key] >= self._limits.per_key:
            raise _refused("This API key has as many requests in progress as it may have.", self._retry_after())
        if self._too_slow or (self.waiting >= self._limits.queue and (self.waiting or self._room.full)):
            raise _refused("The service is at its capacity and its queue is full.", self._retry_after())

    @property
    def _too_slow(self) -> bool:
        """Whether the last in line would most likely wait in vain."""
        if self.waiting:
            return self.expected_wait_s() > _SURE * self._limits.wait_s
        # One may wait whatever the pace was: it is measured while somebody does. But prompts may queue at the
        # engines, too, while there are places.
        unanswered = self._room.unanswered
        return self._pace.seconds_for(unanswered, _now()) > _SURE * self._limits.wait_s

    @asynccontextmanager
    async def admitted(self, key: str, want: Want) -> AsyncIterator[Place]:
        """Hold a place inside the block, after waiting for one; ApiError where none comes free in time."""
        self.refuse_early(key)
        self._per_key[key] += 1
        try:
            place = await self._enter(want)
            self.running += 1
            since = _now()
            try:
                yield place
            finally:
                self.running -= 1
                self._stay_s += (_now() - since - self._stay_s) * (_NEW if self._stay_s else 1.0)
                self._leave(place)
        finally:
            self._per_key[key] -= 1
            if not self._per_key[key]:
                del self._per_key[key]

    async def _enter(self, want: Want) -> Place:
        lane, line = self._room.lane(want), self._lines[want.long]
        if not any(lane in one.lanes for one in self._lines):
            place = self._room.place(want)
            if place is not None:
                return place
            # Its own lane may be full while others are not.
            if self.waiting >= self._limits.queue or self._too_slow:
                raise _refused("The service is at its capacity and its queue is full.", self._retry_after())
        future: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(want.priority, next(self._numbers), want, future)
        if not line:  # it has no claim to what it left to the other line while it was empty
            self._served[want.long] = max(self._served[want.long], self._served[not want.long])
        line.add(lane, waiting)
        self._pace.note(_now(), waits=True)
        patience_s = self._room.patience_s(want)
        try:
            async with asyncio.timeout(
                min(self._limits.wait_s, math.inf if patience_s is None else patience_s)
            ):
                return await future
        except BaseException as error:
            if not future.done() or future.cancelled():
                line.remove(lane, waiting)
                self._pace.note(_now(), waits=self.waiting > 0)
            elif future.exception() is None:
                self._leave(future.result())  # the place was given at the very moment the wait ended
            if isinstance(error, TimeoutError):
                if self._room.patience_s(want) is not None:
                    raise no_path() from None
                raise _refused("No place came free in time.", self._retry_after()) from None
            raise

    def _leave(self, place: Place) -> None:
        place.leave()
        self._pace.note(_now(), waits=self.waiting > 0, ended=1)
        self.refill()

    def refill(self) -> None:
        """Give free places to who waits."""
        while self.waiting and any(self._grant(line) for line in self._turns()):
            pass
        self._pace.note(_now(), waits=self.waiting > 0)

    def _turns(self) -> list[int]:
        """The lines that have somebody, the one first that would have had less once its first is served."""
        ends = []
        for number, line in enumerate(self._lines):
            if line:
                first = line.heads()[0][0]
                ends.append((self._served[number] + first.want.weight / _LINE_SHARES[number], number))
        if len(ends) == 2 and ends[1][0] > ends[0][0] - 1e-9:
            return [0, 1]
        return [number for _, number in sorted(ends)]

    def _grant(self, number: int) -> bool:
        """Let in the first of a line that finds a place."""
        line = self._lines[number]
        for one, lane in line.heads():
            if one.given.done():  # it is leaving
                line.remove(lane, one)
                return True
            try:
                place = self._room.place(one.want)
            except ApiError as error:
                one.given.set_exception(error)
            else:
                if place is None:
                    continue
                self._served[number] += one.want.weight / _LINE_SHARES[number]
                one.given.set_result(place)
            line.remove(lane, one)
            return True
        return False

    def _retry_after(self) -> float:
        return min(max(1.0, self.expected_wait_s()), 60.0)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _refused(message: str, retry_after_s: float) -> ApiError:
    return ApiError(
        429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s
    )
