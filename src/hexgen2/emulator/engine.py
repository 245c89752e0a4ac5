"""Continuous batching in virtual slots: the core of an emulated engine, without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from hexgen2.emulator.memory import KvMemory
from hexgen2.emulator.timing import Timing, Work
from hexgen2.emulator.tokens import TokenModel

MEMORY_POLL_S = 0.1
"""How often an engine that has no memory left looks whether a lease on some of it has run out."""


@dataclass(eq=False)
class Sequence:
    """One generation under way. Tokens arrive in `queue`; None ends it."""

    prompt: list[int]
    max_tokens: int
    kv_ready: bool = False  # the prompt's KV cache came from elsewhere: no prefill
    garbage: bool = False  # ... and was the wrong one: the tokens will be wrong, as on a real engine
    blocks: int = 0  # of KV memory that it holds
    keeps_blocks: bool = False  # at its end: another engine will fetch its KV cache
    allowed: tuple[int, ...] = ()  # the only tokens that it may generate; empty: all
    queue: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)
    generated: int = 0
    aborted: bool = False

    def __post_init__(self) -> None:
        self._model = TokenModel([*self.prompt, -2] if self.garbage else self.prompt, self.allowed)
        self.to_compute = 0 if self.kv_ready else len(self.prompt)
        self.begun = 0  # of these tokens, in iterations that have begun
        self.computed = 0
        self.stepping = False  # its next token is under way

    @property
    def context(self) -> int:
        """Tokens whose KV cache it has, or will have when its prompt is computed."""
        return len(self.prompt) + self.generated

    @property
    def decodes(self) -> bool:
        return self.computed == self.to_compute

    def start_over(self) -> None:
        """Lose the KV cache: all tokens so far are computed again."""
        self.to_compute, self.begun, self.computed = self.context, 0, 0

    @property
    def under_way(self) -> bool:
        return self.stepping or self.begun > self.computed

    def step(self) -> bool:
        """Generate one token; True when that was the last."""
        self.queue.put_nowait(self._model.next_token())
        self.generated += 1
        if self.generated >= self.max_tokens:
            self.queue.put_nowait(None)
            return True
        return False


class EngineCore:
    """Admits waiting sequences into at most `max_batch` slots and the KV memory, and runs iterations of them.

    As in vLLM an iteration has one token of every decoding sequence and fills its token budget with prompts, or
    chunks of them, in their order. When a decoding sequence gets no block, the one that was admitted last gives
    up its own and is computed again. A timing of several stages is a pipeline: a batch begins when the first
    stage is free, and passes each stage after the batch before it.
    """

    def __init__(
        self, timing: Timing, max_batch: int, token_budget: float = inf, memory: KvMemory | None = None
    ) -> None:
        self.timing = timing
        self.max_batch = max_batch
        self.token_budget = token_budget
        self.memory = memory or KvMemory()
        self.reclaim: Callable[[], None] = lambda: None  # called when memory is short
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.preemptions_total = 0
        self.busy_s = 0.0
        self.aborted_total = 0
        self.thawed = asyncio.Event()  # not set: a hang, time stands still
        self.thawed.set()
        self._wake = asyncio.Event()
        self._between = asyncio.Event()  # set while no iteration is under way in the first stage
        self._between.set()
        self._free = [0.0] * timing.depth  # when each stage has done what it has
        self._task: asyncio.Task[None] | None = None
        self._flying = 0
        self._leaving: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop(), name="emulated-engine")
        self._task.add_done_callback(_tell_of_mistake)

    async def between_iterations(self) -> None:
        """Return when no iteration is under way, or the one that is has left the first stage."""
        await self._between.wait()

    async def stop(self) -> None:
        tasks = [task for task in (self._task, *self._leaving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._wake.set()

    def sent(self, tokens: int) -> None:
        """The KV cache of so many tokens has been fetched from here: sending it takes time from the iterations
        that have not begun yet."""
        times, now = self.timing.sending_s(tokens), time.monotonic()
        if any(times):
            self._free[:] = [max(now, free) + seconds for free, seconds in zip(self._free, times, strict=True)]
            self.busy_s += max(times)

    def abort(self, sequence: Sequence) -> None:
        """Frees the slot at once; a sequence that has ended is left alone."""
        if sequence in self.running or sequence in self.waiting:
            sequence.aborted = True
            self.aborted_total += 1
            if sequence in self.running:
                self.running.remove(sequence)
            else:
                self.waiting.remove(sequence)
            self._release(sequence)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV cache the running sequences hold."""
        return sum(s.context for s in self.running)

    async def _loop(self) -> None:
        free = self._free
        idle = True
        while True:
            if self.frozen or not (self.running or self.waiting) or self._flying >= len(free):
                await self._woken()
                idle = True
                continue
            if (sending_s := free[0] - time.monotonic()) > 0:
                await asyncio.sleep(sending_s)
                continue
            self._admit()
            self._grow()
            decoding = [s for s in self.running if s.decodes and not s.stepping and self._has_room(s)]
            chunks = self._chunks(len(decoding))
            if not (decoding or chunks):  # all is under way, or there is no memory for the first that waits
                await self._woken(MEMORY_POLL_S)
                self.reclaim()
                idle = True
                continue
            work = _work(decoding, chunks)
            times = self.timing.stages_s(work)
            self.busy_s += max(times)
            # From due time to due time: what the event loop oversleeps is not added up over the iterations.
            now = time.monotonic()
            end = max(free[0], now if idle else now - 0.05)
            idle = False
            for stage, seconds in enumerate(times):
                end = free[stage] = max(end, free[stage]) + seconds
            for sequence, size in chunks:
                sequence.begun += size
            for sequence in decoding:
                sequence.stepping = True
            self._between.clear()
            if len(free) == 1:
                await self._finish_at(end, decoding, chunks)
            else:
                self._flying += 1
                task = asyncio.create_task(self._leave(end, decoding, chunks))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
                await asyncio.sleep(max(0.0, free[0] - time.monotonic()))
            self._between.set()

    async def _woken(self, limit_s: float | None = None) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), limit_s)

    async def _leave(self, end: float, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]) -> None:
        """A batch goes through the pipeline."""
        await self._finish_at(end, decoding, chunks)
        self._flying -= 1
        self._wake.set()

    async def _finish_at(
        self, end: float, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]
    ) -> None:
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        if self.frozen:  # time stands still: what was under way is done again later
            for sequence, size in chunks:
                sequence.begun -= size
            for sequence in decoding:
                sequence.stepping = False
        else:
            self._finish(decoding, chunks)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            head = self.waiting[0]
            if not head.blocks:
                blocks = self.memory.blocks(head.context)
                if not self.memory.try_take(blocks):
                    break
                head.blocks = blocks
            self.waiting.popleft()
            self.running.append(head)

    def _grow(self) -> None:
        """A block more for each decoding sequence whose next token begins one."""
        for sequence in list(self.running):
            needed = self.memory.blocks(sequence.context + 1)
            while sequence in self.running and sequence.decodes and needed > sequence.blocks:
                if self.memory.grow(1):
                    sequence.blocks += 1
                elif not self._preempt():
                    break

    def _has_room(self, sequence: Sequence) -> bool:
        return sequence.blocks >= self.memory.blocks(sequence.context + 1)

    def _preempt(self) -> bool:
        """Take the memory of the sequence that was admitted last, of those that are not under way."""
        last = next((s for s in reversed(self.running) if not s.under_way), None)
        if last is None:
            return False
        self.running.remove(last)
        self._release(last)
        last.start_over()
        self.preemptions_total += 1
        self.waiting.appendleft(last)
        return True

    def _chunks(self, decoding: int) -> list[tuple[Sequence, int]]:
        """Prompts, or parts of them, within what the decoding sequences leave of the budget."""
        room = max(1.0, self.token_budget - decoding)
        chunks: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            if room <= 0:
                break
            if sequence.begun < sequence.to_compute:
                size = int(min(sequence.to_compute - sequence.begun, room))
                chunks.append((sequence, size))
                room -= size
        return chunks

    def _finish(self, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]) -> None:
        """The iteration is over: tokens for those that are still here."""
        here = set(map(id, self.running))
        for sequence in decoding:
            sequence.stepping = False
        yielding = [s for s in decoding if id(s) in here]
        for sequence, size in chunks:
            if id(sequence) in here:
                sequence.computed += size
                self.prompt_tokens_total += size
                if sequence.decodes:
                    yielding.append(sequence)
        self.generation_tokens_total += len(yielding)
        ended = {id(s) for s in yielding if s.step()}
        if ended:
            for sequence in self.running:
                if id(sequence) in ended and not sequence.keeps_blocks:
                    self._release(sequence)
            self.running = [s for s in self.running if id(s) not in ended]

    def _release(self, sequence: Sequence) -> None:
        self.memory.give(sequence.blocks)
        sequence.blocks = 0

    @property
    def frozen(self) -> bool:
        return not self.thawed.is_set()

    def freeze(self) -> None:
        self.thawed.clear()

    def thaw(self) -> None:
        self.thawed.set()
        self._wake.set()


def _tell_of_mistake(task: asyncio.Task[None]) -> None:
    """An engine that died of its own mistake must not look like one that hangs."""
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": "an emulated engine died", "exception": error})


def _work(decoding: list[Sequence], chunks: list[tuple[Sequence, int]]) -> Work:
    return Work(
        prompts=len(chunks),
        prompt_tokens=sum(size for _, size in chunks),
        squares=sum((s.begun + size) ** 2 - s.begun**2 for s, size in chunks),
        batch=len(decoding),
        context=sum(s.context + 1 for s in decoding),
        begun=sum(s.begun == 0 for s, _ in chunks),
        taken=sum(s.kv_ready and s.generated == 0 for s in decoding),
    )
