"""Continuous batching in virtual slots: the core of an emulated engine, without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field

from hexgen2.emulator.timing import Timing
from hexgen2.emulator.tokens import TokenModel


@dataclass(eq=False)
class Sequence:
    """One generation under way. Tokens arrive in `queue`; None ends it."""

    prompt: list[int]
    max_tokens: int
    kv_ready: bool = False  # the prompt's KV cache came from elsewhere: no prefill
    garbage: bool = False  # ... and was the wrong one: the tokens will be wrong, as on a real engine
    queue: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)
    generated: int = 0
    aborted: bool = False

    def __post_init__(self) -> None:
        self._model = TokenModel([*self.prompt, -2] if self.garbage else self.prompt)

    def step(self) -> bool:
        """Generate one token; True when that was the last."""
        self.queue.put_nowait(self._model.next_token())
        self.generated += 1
        if self.generated >= self.max_tokens:
            self.queue.put_nowait(None)
            return True
        return False


class EngineCore:
    """Admits waiting sequences into at most `max_batch` slots, prefills them, steps all, and repeats."""

    def __init__(self, timing: Timing, max_batch: int) -> None:
        self.timing = timing
        self.max_batch = max_batch
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.busy_s = 0.0
        self.aborted_total = 0
        self.thawed = asyncio.Event()  # not set: a hang, time stands still
        self.thawed.set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop(), name="emulated-engine")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._wake.set()

    def abort(self, sequence: Sequence) -> None:
        """Frees the slot at once; a sequence that has ended is left alone."""
        if sequence in self.running or sequence in self.waiting:
            sequence.aborted = True
            self.aborted_total += 1
            if sequence in self.running:
                self.running.remove(sequence)
            else:
                self.waiting.remove(sequence)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV cache the running sequences hold."""
        return sum(len(s.prompt) + s.generated for s in self.running)

    async def _loop(self) -> None:
        due = time.monotonic()
        while True:
            if self.frozen or not (self.running or self.waiting):
                self._wake.clear()
                await self._wake.wait()
                due = time.monotonic()
                continue
            admitted: list[Sequence] = []
            while self.waiting and len(self.running) + len(admitted) < self.max_batch:
                admitted.append(self.waiting.popleft())
            self.running.extend(admitted)
            fresh = sum(len(s.prompt) for s in admitted if not s.kv_ready)
            took = self.timing.prefill_s(fresh) if fresh else 0.0
            took += self.timing.decode_step_s(len(self.running), self.kv_tokens)
            self.prompt_tokens_total += sum(len(s.prompt) for s in admitted)
            self.busy_s += took
            # Sleep to a due time, not for a duration: what the event loop oversleeps is not added up over
            # the steps.
            due = max(due + took, time.monotonic() - 0.05)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if self.frozen:
                continue
            self.generation_tokens_total += len(self.running)
            self.running = [s for s in self.running if not s.step()]

    @property
    def frozen(self) -> bool:
        return not self.thawed.is_set()

    def freeze(self) -> None:
        self.thawed.clear()

    def thaw(self) -> None:
        self.thawed.set()
        self._wake.set()
