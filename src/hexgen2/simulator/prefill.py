"""A prefill group: whole prompts in batches of at most the token budget, through a pipeline of stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hexgen2.cost.capacity import prefill_times
from hexgen2.cost.memory import Settings
from hexgen2.cost.replica import Compiled
from hexgen2.simulator.events import Events
from hexgen2.simulator.sequence import Sequence


class PrefillGroup:
    """First come, first served. A prompt keeps its KV blocks until its cache has left (`release`).

    A batch begins when the first stage is free, the pipeline has fewer batches than stages, and blocks are
    there; each stage takes it when the stage before has finished it and the batch before has left.
    """

    def __init__(
        self,
        events: Events,
        compiled: Compiled,
        settings: Settings,
        max_batch: int,
        done: Callable[[Sequence], None],
    ) -> None:
        self._events = events
        self._costs = compiled.costs
        self._settings = settings
        self._max_batch = max_batch
        self._done = done
        self.max_tokens = compiled.max_tokens
        self._free_blocks = compiled.max_tokens // settings.block_size
        self._blocks = self._free_blocks
        self._queue: deque[Sequence] = deque()
        self._stage_free = [0.0] * len(compiled.costs)
        self._batches = 0
        self._running = 0
        self._called_for = -1.0
        self.requests = 0
        self.tokens = 0
        self.batches = 0
        self.busy_s = 0.0
        self.peak_blocks = 0

    def submit(self, sequence: Sequence) -> None:
        """A request has come."""
        self._queue.append(sequence)
        self._begin()

    def release(self, sequence: Sequence) -> None:
        """The KV cache of a finished prompt has been fetched."""
        self._free_blocks += self._needed(sequence)
        self._begin()

    def _needed(self, sequence: Sequence) -> int:
        return -(-sequence.inputs // self._settings.block_size)

    def _begin(self, _: Any = None) -> None:
        """Start a batch if the first stage is free for one."""
        now = self._events.now
        if not self._queue or self._batches >= len(self._costs):
            return
        if self._stage_free[0] > now:
            if self._called_for != self._stage_free[0]:
                self._called_for = self._stage_free[0]
                self._events.at(self._called_for, self._begin)
            return
        batch, tokens = self._next_batch()
        if not batch:
            return
        squares = float(sum(sequence.inputs**2 for sequence in batch))
        chunks, times = prefill_times(self._costs, tokens, squares, len(batch), self._settings.token_budget)
        end = now
        for _chunk in range(chunks):
            end = now
            for stage, seconds in enumerate(times):
                end = max(end, self._stage_free[stage]) + seconds
                self._stage_free[stage] = end
        self._batches += 1
        self._running += len(batch)
        self.batches += 1
        self.requests += len(batch)
        self.tokens += tokens
        self.busy_s += chunks * max(times)
        self._events.at(end, self._end, batch)
        self._begin()  # asks to be called when the first stage is free again

    def _next_batch(self) -> tuple[list[Sequence], int]:
        """Prompts from the head of the queue, and their tokens; the first may exceed the budget alone."""
        batch: list[Sequence] = []
        tokens = 0
        budget = self._settings.token_budget
        while self._queue and self._running + len(batch) < self._max_batch:
            head = self._queue[0]
            needed = self._needed(head)
            if needed > self._free_blocks or (batch and tokens + head.inputs > budget):
                break
            batch.append(self._queue.popleft())
            tokens += head.inputs
            self._free_blocks -= needed
        self.peak_blocks = max(self.peak_blocks, self._blocks - self._free_blocks)
        return batch, tokens

    def _end(self, batch: list[Sequence]) -> None:
        self._batches -= 1
        self._running -= len(batch)
        for sequence in batch:
            sequence.prefilled = self._events.now
            self._done(sequence)
        self._begin()
