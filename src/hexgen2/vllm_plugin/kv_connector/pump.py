"""When to look at the network: often while bytes move, seldom while none do, and never while nobody needs it.

Over TCP nothing moves unless both sides look: the reader's side takes out what has come and asks for more, the
other one puts in what was asked for. Who looks too seldom lets the kernel's buffers run full (or empty) and the
bytes grow cold in them; who never stops looking takes a core from the model. So a look that had much to do, as
measured by the time it took, is soon followed by the next, and the pauses grow while there is little to do: on
a slow link, over shared memory (where the side that is read from has no part in it), or when a peer hangs.

The short pauses are slept in place, since an event loop cannot wait for less than a millisecond (epoll).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

logger = logging.getLogger("vllm.hexgen2.kv")

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 20e-6, 1e-3
FIRST_PAUSE_S = 100e-6
"""After a peer's word that it will read. It may not need this side at all, and the model's thread has to share
Python's lock with each look.
"""
LONGEST_SLEEP_S = 250e-6
"""How long the event loop is kept from its other work at most, but for one look."""
MUCH, LITTLE = 1 / 2, 1 / 8
"""A look that took this part of the pause before it had much or little to do."""
GROWTH = 1.2
PATIENCE = 16
"""Looks in vain after which a side that looked without a pause takes one."""
FAILED_PAUSE_S = 0.1
PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class Pace:
    """The pause between two looks. It follows the traffic by what looking costs, so on no link and no processor
    much more time goes into looks than the bytes need. With the shortest pause and still much to do there is
    none: where the processor is the limit, who sleeps has to wait for a core when it wakes.

    >>> pace = Pace(160e-6)
    >>> pace.after(100e-6).pause_s, pace.after(50e-6).pause_s, pace.after(1e-6).pause_s  # much, some, nothing
    (8e-05, 0.00016, 0.000192)
    """

    pause_s: float = SHORTEST_PAUSE_S
    in_vain: int = 0

    def after(self, look_s: float) -> Pace:
        """The pace after a look that took `look_s` seconds."""
        if look_s >= MUCH * max(self.pause_s, SHORTEST_PAUSE_S):
            shorter = max(self.pause_s / 2, SHORTEST_PAUSE_S)
            return Pace(shorter if self.pause_s > SHORTEST_PAUSE_S else 0.0)
        if not self.pause_s:
            in_vain = self.in_vain + 1
            return Pace(0.0, in_vain) if in_vain < PATIENCE else Pace()
        if look_s < LITTLE * self.pause_s:
            return Pace(min(self.pause_s * GROWTH, LONGEST_PAUSE_S))
        return self


def rest(seconds: float) -> None:
    """Sleep; with 0 seconds only let go first who waits for the core."""
    if seconds:
        time.sleep(seconds)
    else:
        os.sched_yield()


class Pump:
    """Calls `look` while somebody needs it: peers that read from here (`serve`), or reads of one's own
    (`watch`). Belongs to one event loop. `clock` and `sleep` are those of the operating system but in tests.
    """

    def __init__(
        self,
        look: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = rest,
    ) -> None:
        self._look = look
        self._clock = clock
        self._sleep = sleep
        self._served: Counter[Hashable] = Counter()
        self._until = 0.0
        self._watched: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._next: asyncio.Handle | None = None
        self._pace = Pace()
        self._closed = False

    @property
    def pause_s(self) -> float:
        """The pause before the next look; infinite while there is none to come."""
        return self._pace.pause_s if self._next is not None else float("inf")

    def serve(self, reading: Hashable) -> None:
        """A peer begins to read. Counted: as often as it was served it must be `served` again."""
        self._served[reading] += 1
        self._hurry(FIRST_PAUSE_S)

    def served(self, reading: Hashable) -> None:
        """The peer's read is over."""
        self._served[reading] -= 1
        if self._served[reading] <= 0:
            del self._served[reading]

    def serve_for(self, seconds: float) -> None:
        """Somebody may need this side for so long."""
        self._until = max(self._until, self._clock() + seconds)
        self._hurry(FIRST_PAUSE_S)

    async def watch(self, over: Callable[[], bool]) -> None:
        """Look, and ask `over` after each look, until it says yes. What it raises is raised here."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (over, future)
        self._watched.append(entry)
        self._hurry(SHORTEST_PAUSE_S)
        try:
            await future
        finally:
            with contextlib.suppress(ValueError):
                self._watched.remove(entry)

    def close(self) -> None:
        """No look any more."""
        self._closed = True
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _hurry(self, pause_s: float) -> None:
        """Look at once, and then after this pause or a shorter one: there is something to come."""
        if self._next is None or pause_s < self._pace.pause_s:
            self._pace = Pace(pause_s)
        if self._next is not None:
            self._next.cancel()
        if not self._closed:
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def _needed(self) -> bool:
        return bool(self._watched or self._served) or self._clock() < self._until

    def _turn(self) -> None:
        """Some looks; then the loop's other work has its turn."""
        begin = self._clock()
        self._next = None
        while self._needed():
            looked = self._clock()
            try:
                self._look()
                least = 0.0
            except Exception:  # NIXL raises its own types; who reads notices by itself
                logger.exception("KV transport: a look at the network failed")
                least = FAILED_PAUSE_S
            ended = self._ask()
            self._pace = self._pace.after(self._clock() - looked)
            pause = max(self._pace.pause_s, least)
            if ended or self._clock() - begin + pause > LONGEST_SLEEP_S:
                self._schedule(pause if pause > LONGEST_SLEEP_S else 0.0)
                return
            self._sleep(pause)

    def _ask(self) -> bool:
        """Whether a watched read is over, or can no longer be asked."""
        ended = False
        for entry in list(self._watched):
            over, future = entry
            try:
                if not over():
                    continue
                if not future.done():
                    future.set_result(None)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            self._watched.remove(entry)
            ended = True
        return ended

    def _schedule(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._next = loop.call_later(pause_s, self._turn) if pause_s else loop.call_soon(self._turn)


def sleep_to_the_microsecond() -> None:
    """Let this thread's short sleeps be as short as they should: Linux adds 50 us to each otherwise."""
    with contextlib.suppress(AttributeError, OSError):  # not on Linux: the pauses are a little longer
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
