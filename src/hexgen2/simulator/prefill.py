"""A prefill group: prompts in batches of the token budget, through a pipeline of stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hexgen2.cost.memory import Settings
from hexgen2.cost.replica import Compiled
from hexgen2.simulator.events import Events
from hexgen2.simulator.sequence import Sequence


class PrefillGroup:
    """First come, first served; a prompt that the budget cuts goes on in the next batch, as in vLLM.

    A batch begins when the first stage is free and the pipeline has fewer batches than stages; a stage takes it
    when the stage before has finished it and the batch before has left. A prompt gets its KV blocks when it
    begins and keeps them until its cache has left (`release`). What sending it took is lost for the batches
    that have not begun by then.
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
        self._called = False
        self.requests = 0
        self.tokens = 0
        self.batches = 0
        self.busy_s = 0.0
        self.peak_blocks = 0

    @property
    def kv_used(self) -> float:
        """The part of its KV blocks in use."""
        return 1.0 - self._free_blocks / self._blocks if self._blocks else 1.0

    def submit(self, sequence: Sequence) -> None:
        """A request has come."""
        self._queue.append(sequence)
        self._begin_soon()

    def release(self, sequence: Sequence) -> None:
        """The KV cache of a finished prompt has been fetched."""
        self._free_blocks += self._needed(sequence)
        times = [cost.sending_s(1, sequence.inputs) for cost in self._costs]
        if any(times):
            now = self._events.now
            self._stage_free = [
                max(now, free) + seconds for free, seconds in zip(self._stage_free, times, strict=True)
            ]
            self.busy_s += max(times)
        self._begin_soon()

    def _needed(self, sequence: Sequence) -> int:
        return -(-sequence.inputs // self._settings.block_size)

    def _begin_soon(self) -> None:
        """Ask to be called when the first stage is free, at the earliest after all else of this instant."""
        if self._queue and not self._called and self._batches < len(self._costs):
            self._called = True
            self._events.at(self._stage_free[0], self._begin)

    def _begin(self, _: None) -> None:
        """Start a batch, if there is room for one."""
        self._called = False
        if self._stage_free[0] > self._events.now:  # it has had a cache to send since
            self._begin_soon()
            return
        tokens, squares, prompts, begun, whole = self._next_batch()
        if not tokens:
            return
        end = self._events.now
        times = [cost.seconds(tokens, squares, 0.0, prompts, begun) for cost in self._costs]
        for stage, seconds in enumerate(times):
            end = max(end, self._stage_free[stage]) + seconds
            self._stage_free[stage] = end
        self._batches += 1
        self.batches += 1
        self.requests += len(whole)
        self.tokens += tokens
        self.busy_s += max(times)
        self._events.at(end, self._end, whole)
        self._begin_soon()

    def _next_batch(self) -> tuple[int, float, int, int, list[Sequence]]:
        """From the head of the queue, up to the budget: tokens, their part of Σs², prompts, how many of them
        begin, those that end."""
        tokens, squares, prompts, begun = 0, 0, 0, 0
        whole: list[Sequence] = []
        budget = self._settings.token_budget
        while self._queue and tokens < budget:
            head = self._queue[0]
            done = head.done_prompt
            if done == 0:
                needed = self._needed(head)
                if needed > self._free_blocks or self._running >= self._max_batch:
                    break
                self._free_blocks -= needed
                self._running += 1
                begun += 1
            chunk = min(head.inputs - done, budget - tokens)
            head.done_prompt += chunk
            tokens += chunk
            prompts += 1
            squares += (done + chunk) ** 2 - done**2
            if head.done_prompt == head.inputs:
                whole.append(self._queue.popleft())
        self.peak_blocks = max(self.peak_blocks, self._blocks - self._free_blocks)
        return tokens, float(squares), prompts, begun, whole

    def _end(self, whole: list[Sequence]) -> None:
        """A batch has left the last stage."""
        self._batches -= 1
        self._running -= len(whole)
        for sequence in whole:
            sequence.prefilled = self._events.now
            self._done(sequence)
        self._begin_soon()
