"""KV caches that are read while they are still being computed.

Both legs of a request may be under way at once: they share a *key*, which the coordinator draws. The prefill
engine's workers then tell whoever follows the key how far its KV cache has come, and readers fetch what is
there while later layers and chunks are computed.

What makes such reads safe: a stream is *over* before any of its blocks can be given to another request, and it
is marked so on vLLM's own thread before the forward pass that might overwrite them. So a reader that finds its
stream still alive AFTER its last read knows that all its reads were right, as with leases. When the prefill has
ended, the stream goes on as the lease of its blocks.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from hexgen2.vllm_plugin.kv_connector.leases import LeaseBook, LeaseState

FORGET_S = 600.0
"""How long the word that a stream is over is kept."""
FENCE_POLL_S = 0.0005


@dataclass(frozen=True)
class StreamStep:
    """The scheduler's word about one step of a prefill: `done` tokens were computed in earlier steps, this one
    computes up to `ahead`, for which the scheduler's `new_blocks` are added.
    """

    key: str
    request: str
    done: int
    ahead: int
    new_blocks: tuple[int, ...]


@dataclass(frozen=True)
class StreamEnd:
    """The prefill is no more (aborted, preempted): its blocks may be another request's from this step on."""

    key: str
    reason: str


@dataclass(frozen=True)
class Progress:
    """How far a KV cache has come: all layers hold `done` tokens, the worker's first `layers` ones `ahead`."""

    done: int = 0
    layers: int = 0
    ahead: int = 0

    def amount(self, layers: int) -> int:
        """Tokens counted once for each of the worker's `layers` that holds them; it rises with the computation.

        >>> Progress(96, 2, 192).amount(layers=8)
        960
        """
        return self.done * layers + self.layers * max(0, self.ahead - self.done)


NOTHING = Progress(-1)


@dataclass(frozen=True)
class Wanted:
    """What a reader waits for: an amount, or all layers with `stop` tokens."""

    amount: int
    stop: int


@dataclass
class _Stream:
    request: str
    since: float
    progress: Progress = NOTHING
    blocks: tuple[int, ...] = ()
    over: str = ""
    lease: int | None = None
    released: bool = False
    holds: dict[str, float] = field(default_factory=dict)


Ready = Callable[[], bool]


class StreamBook:
    """The streams of one worker, beside its book of leases. Made on the transfer thread, whose loop it uses.

    `layers` are the worker's layers in the order of its table. `fence` marks a point in the device's work and
    returns what tells whether the device has got there; None where work is done when its call returns (CPU).
    """

    def __init__(
        self, layers: Sequence[str], book: LeaseBook, fence: Callable[[], Ready] | None = None
    ) -> None:
        self._index = {layer: number for number, layer in enumerate(layers)}
        self._book = book
        self._fence = fence
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}  # by their `since`, the oldest first
        self._waiting: dict[str, dict[asyncio.Future[None], Wanted]] = {}
        self._step: tuple[StreamStep, ...] = ()  # of vLLM's thread alone
        self._layers = 0

    # On vLLM's thread.

    def begin_step(self, steps: Sequence[StreamStep], ends: Sequence[StreamEnd]) -> None:
        """Before a forward pass: what it adds to which stream, and which streams are over."""
        now = time.monotonic()
        with self._lock:
            for end in ends:
                stream = self._anew(end.key, now)
                stream.over = stream.over or end.reason
                self._wake(end.key)
            for step in steps:
                stream = self._streams.setdefault(step.key, _Stream(step.request, now))
                stream.request = stream.request or step.request
                if stream.request != step.request or stream.lease is not None:
                    stream.over = stream.over or "two requests have one key"
                stream.blocks += step.new_blocks
        self._step, self._layers = tuple(steps), 0
        self._publish([(step.key, Progress(step.done, 0, step.ahead)) for step in steps])

    def layer_done(self, layer: str) -> None:
        """The forward pass has computed a layer's KV."""
        if not self._step or self._index.get(layer) != self._layers:
            return  # only what comes in the table's order counts; the rest shows at the step's end
        self._layers += 1
        if self._layers == len(self._index):
            self._publish([(step.key, Progress(step.ahead)) for step in self._step])
        else:
            self._publish([(step.key, Progress(step.done, self._layers, step.ahead)) for step in self._step])

    def end_step(self) -> None:
        """The forward pass is over."""
        step, self._step = self._step, ()
        if step:
            self._publish([(one.key, Progress(one.ahead)) for one in step])

    def _publish(self, news: list[tuple[str, Progress]]) -> None:
        if not news:
            return
        if self._fence is None:
            self._apply(news)
        else:
            self._loop.call_soon_threadsafe(self._apply_when, self._fence(), news)

    def _apply_when(self, ready: Ready, news: list[tuple[str, Progress]]) -> None:
        if ready():
            self._apply(news)
        else:
            self._loop.call_later(FENCE_POLL_S, self._apply_when, ready, news)

    def _apply(self, news: list[tuple[str, Progress]]) -> None:
        with self._lock:
            for key, progress in news:
                stream = self._streams.get(key)
                if stream is not None and self._amount(progress) > self._amount(stream.progress):
                    stream.progress = progress
                    self._wake(key)

    def _amount(self, progress: Progress) -> int:
        return progress.amount(len(self._index))

    def _is_there(self, stream: _Stream, wanted: Wanted) -> bool:
        progress = stream.progress
        return bool(stream.over) or progress.done >= wanted.stop or self._amount(progress) >= wanted.amount

    def _wake(self, key: str) -> None:
        # Waking the other thread has its price; so it is done for those only whose time has come.
        waiting = self._waiting.get(key, {})
        stream = self._streams[key]
        if any(self._is_there(stream, wanted) for wanted in waiting.values()):
            self._loop.call_soon_threadsafe(self._set, key)

    # On the transfer thread.

    def _set(self, key: str) -> None:
        with self._lock:
            stream = self._streams.get(key)
            if stream is None:
                return
            ready = [
                future
                for future, wanted in self._waiting.get(key, {}).items()
                if self._is_there(stream, wanted)
            ]
        for future in ready:
            if not future.done():
                future.set_result(None)

    async def wait(self, key: str, wanted: Wanted, wait_s: float) -> None:
        """Return when the stream has come so far or is over; at the latest after `wait_s`."""
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            stream = self._streams.get(key)
            if stream is not None and self._is_there(stream, wanted):
                return
            self._waiting.setdefault(key, {})[future] = wanted
        try:
            async with asyncio.timeout(wait_s):
                await future
        except TimeoutError:
            pass
        finally:
            with self._lock:
                if waiting := self._waiting.get(key):
                    waiting.pop(future, None)
                    if not waiting:
                        del self._waiting[key]

    def look(self, key: str, known_blocks: int) -> tuple[LeaseState, str, Progress, tuple[int, ...]]:
        """State, its reason in words, progress, and the blocks from number `known_blocks` on."""
        with self._lock:
            stream = self._streams.get(key)
            state, reason = self._state(stream)
            if stream is None:
                return state, reason, NOTHING, ()
            return state, reason, stream.progress, stream.blocks[known_blocks:]

    def _state(self, stream: _Stream | None) -> tuple[LeaseState, str]:
        if stream is None:
            return LeaseState.UNKNOWN, "the prefill has not begun"
        if stream.over:
            return LeaseState.ENDED, stream.over
        if stream.lease is not None:
            state = self._book.state(stream.lease)
            return state, f"the lease is {state}"
        if stream.progress == NOTHING:
            return LeaseState.UNKNOWN, "the prefill has not begun"
        return LeaseState.HELD, "the prefill is under way"

    def leased(self, key: str, lease: int) -> None:
        """The prefill has ended well, and its blocks are under this lease, which the book has."""
        now = time.monotonic()
        with self._lock:
            stream = self._anew(key, now)
            stream.lease = lease
            for reader, until in stream.holds.items():
                self._book.announce(lease, reader, hold_s=until - now, now=now)
            if stream.released:
                self._book.release(lease)
            self._wake(key)

    def announce(self, key: str, reader: str, *, hold_s: float, now: float) -> tuple[LeaseState, str]:
        """As `LeaseBook.announce`; while the prefill is under way it holds the lease to come."""
        with self._lock:
            stream = self._streams.get(key)
            state, reason = self._state(stream)
            if stream is not None and state is LeaseState.HELD:
                stream.holds[reader] = now + hold_s
                if stream.lease is not None:
                    self._book.announce(stream.lease, reader, hold_s=hold_s, now=now)
            return state, reason

    def finish(self, key: str, reader: str) -> tuple[LeaseState, str]:
        """As `LeaseBook.finish`: HELD means that all that was read is right."""
        with self._lock:
            stream = self._streams.get(key)
            answer = self._state(stream)
            if stream is not None:
                stream.holds.pop(reader, None)
                if stream.lease is not None:
                    self._book.finish(stream.lease, reader)
            return answer

    def renew(self, key: str, *, duration_s: float, now: float) -> tuple[LeaseState, str]:
        with self._lock:
            stream = self._streams.get(key)
            if stream is not None and stream.lease is not None:
                self._book.renew(stream.lease, duration_s=duration_s, now=now)
            return self._state(stream)

    def release(self, key: str) -> tuple[LeaseState, str]:
        """Nobody will read any more. May come before the prefill's end or beginning; that is remembered."""
        with self._lock:
            stream = self._streams.setdefault(key, _Stream("", time.monotonic()))
            answer = self._state(stream)
            stream.released = True
            if stream.lease is not None:
                self._book.release(stream.lease)
            return answer

    def forget(self, now: float) -> None:
        """Drop what has long been over, and keys of which nothing but an early release was ever heard.

        vLLM's thread waits meanwhile, so only the old ones are looked at, and one that is still held only after
        as long again.
        """
        with self._lock:
            old = takewhile(lambda one: now - one[1].since > FORGET_S, self._streams.items())
            for key, stream in list(old):
                if self._state(stream)[0] is LeaseState.HELD:
                    self._anew(key, now)
                else:
                    del self._streams[key]

    def _anew(self, key: str, now: float) -> _Stream:
        """The stream, as the youngest of all."""
        stream = self._streams.pop(key, None) or _Stream("", now)
        stream.since = now
        self._streams[key] = stream
        return stream
