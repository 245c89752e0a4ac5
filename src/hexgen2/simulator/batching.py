"""An engine that generates: continuous batching, chunked prefill, block-limited memory, preemption.

It serves colocated groups, and decode groups, whose prompts arrive as KV caches. Between two changes of the
batch all steps are alike but for the growing contexts, so a run of steps is one event, with its times in
closed form.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from math import ceil, sqrt

from hexgen2.cost.capacity import cycle_seconds, decode_cycle
from hexgen2.cost.memory import Settings
from hexgen2.cost.replica import Compiled
from hexgen2.simulator.blocks import Blocks
from hexgen2.simulator.events import Events
from hexgen2.simulator.sequence import Sequence

WATERMARK = 0.01
"""Part of the KV blocks that an engine without chunked prefill leaves free when it lets in prompts beside
running sequences, as vLLM did: else a sequence that was preempted for want of a block would come back at
once, be computed again while the others wait, and be preempted again."""


class Engine:
    """First come, first served; running sequences before new prompts, as vLLM schedules them.

    ``fetch`` starts the KV transfer of a sequence that has got its blocks; `arrived` is called when it is
    there. When blocks run out, the sequence that joined last makes room; its tokens are computed again.

    ``hold_back``: sequences whose KV cache is on its way or waits for a place count among ``max_batch``, as if
    whoever sends them kept to it. Without, they count only when they run, as in vLLM itself: with many waiting,
    caches then fill the memory before there is a place for them, and running sequences are preempted.
    """

    def __init__(
        self,
        events: Events,
        compiled: Compiled,
        settings: Settings,
        max_batch: int,
        done: Callable[[Sequence], None],
        fetch: Callable[[Sequence], None] | None = None,
        *,
        hold_back: bool = True,
    ) -> None:
        self._events = events
        self._costs = compiled.costs
        self._max_batch = max_batch
        # A pipeline takes one micro-batch per stage, each with a budget of its own.
        self._budget = settings.token_budget * len(compiled.costs)
        self._mixes = settings.chunked_prefill
        self._asks_between_steps = settings.fetch_between_steps
        self._done = done
        self._fetch = fetch
        self._hold_back = hold_back
        self.max_tokens = compiled.max_tokens
        self.blocks = Blocks(compiled.max_tokens // settings.block_size, settings.block_size)
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._ready: deque[Sequence] = deque()
        self._without_token: list[Sequence] = []
        self._running: dict[int, Sequence] = {}
        self._ends: list[tuple[int, int, Sequence]] = []
        self._fetching = 0
        self._taken = 0  # KV caches taken over since the last step began, and their tokens
        self._taken_tokens = 0
        self._handoffs = any(cost.handoff_s or cost.handoff_token_s for cost in compiled.costs)
        self._starting = False
        self._context = 0
        # The run of steps under way: its start, its steps, and the seconds of its first step and their growth.
        self._steps = 0
        self._start = 0.0
        self._first_s = 0.0
        self._growth_s = 0.0
        self._chunks: list[tuple[Sequence, int]] = []
        self._prompts_only = False
        self._version = 0
        self.requests = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.preemptions = 0
        self.busy_s = 0.0
        self.steps = 0
        self.sequence_steps = 0

    @property
    def kv_used(self) -> float:
        """The part of its KV blocks in use, as of the last change of the batch."""
        return self.blocks.used / self.blocks.total if self.blocks.total else 1.0

    def submit(self, sequence: Sequence) -> None:
        """A request has come: to be prefilled here (``pending``), or its KV cache to be fetched."""
        self._waiting.append(sequence)
        self._wake()

    def arrived(self, sequence: Sequence) -> None:
        """The KV cache of a sequence is here."""
        self._fetching -= 1
        self._ready.append(sequence)
        self._wake()

    def _wake(self) -> None:
        """Something is new: let it in, at the end of the step under way if there is one."""
        if self._steps:
            self._catch_up()
        self._admit()
        if not self._steps:
            if not self._starting:
                # After all else that happens at this instant, so that what comes together runs together.
                self._starting = True
                self._events.at(self._events.now, self._start_idle)
        elif self._steps > 1:
            joining = self._ready or self._prefilling or self._asks_for_cache()
            self._cut_to(1 if joining else self.blocks.steps_left(self._steps))

    def _start_idle(self, _: None) -> None:
        self._starting = False
        if not self._steps:
            self._go_on()

    def _asks_for_cache(self) -> bool:
        """Whether the next request waits for nothing but the end of the step to have its KV cache fetched."""
        if not self._asks_between_steps:
            return False
        return bool(self._waiting) and not self._waiting[0].pending and self._places() > 0

    def _admit(self) -> None:
        """Give blocks to waiting requests in their order, as long as there are blocks and places.

        With `Settings.fetch_between_steps` a KV cache is asked for when no step is under way.
        """
        under_way = self.blocks.next_step() if self._steps else 0
        if self._running and not self._mixes:
            under_way = max(self.blocks.next_step(), ceil(WATERMARK * self.blocks.total))
        while self._waiting and self._places() > 0:
            head = self._waiting[0]
            if self._steps and self._asks_between_steps and not head.pending:
                return
            blocks = self.blocks.needed(max(head.pending, head.inputs))
            if not self.blocks.reserve(blocks, under_way):
                return
            self._waiting.popleft()
            head.blocks = blocks
            if head.pending:
                head.done_prompt = 0
                self._prefilling.append(head)
            else:
                self._fetching += 1
                assert self._fetch is not None, "a group without routes gets prompts"
                self._fetch(head)

    def _places(self) -> int:
        taken = len(self._running) + len(self._prefilling)
        if self._hold_back:
            taken += len(self._ready) + self._fetching
        return self._max_batch - taken

    def _go_on(self) -> None:
        """Between two runs: let in what is ready, begin the next run."""
        self._admit()
        while self._ready and len(self._running) + len(self._prefilling) < self._max_batch:
            head = self._ready.popleft()
            self._join(head, head.inputs)
            self._taken += 1
            self._taken_tokens += head.inputs
        while self._running and self.blocks.steps_left(1) == 0:
            self._preempt()
        if self._prefilling:
            self._begin_mixed()
        elif self._running:
            self._begin_decode()

    def _join(self, sequence: Sequence, context: int) -> None:
        sequence.context = context
        sequence.step = self.blocks.step
        sequence.finish_step = sequence.step + sequence.outputs - sequence.generated
        self._running[sequence.number] = sequence
        self._context += context
        self.blocks.join(context)
        heappush(self._ends, (sequence.finish_step, sequence.number, sequence))
        if sequence.first != sequence.first:  # NaN: it has none yet
            self._without_token.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        del self._running[sequence.number]
        self._context -= sequence.context + self.blocks.step - sequence.step
        self.blocks.leave(sequence.context, sequence.step)

    def _preempt(self) -> None:
        """Take the blocks of the sequence that joined last; it starts over, before those that wait."""
        sequence = self._running[next(reversed(self._running))]
        self._leave(sequence)
        sequence.generated += self.blocks.step - sequence.step
        sequence.pending = sequence.inputs + sequence.generated
        sequence.finish_step = -1  # its entry among the ends is void
        sequence.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(sequence)

    def _begin_decode(self) -> None:
        """Steps until a sequence ends or blocks run out; each reads one more token for every sequence."""
        while self._ends[0][2].finish_step != self._ends[0][0]:
            heappop(self._ends)  # preempted since
        taken, taken_tokens = self._take_over()
        # A step that takes requests over lasts longer than those after it, so it is a run of its own.
        most = 1 if taken and self._handoffs else self._ends[0][0] - self.blocks.step
        steps = self.blocks.steps_left(most)
        batch = len(self._running)
        context = self._context + batch
        self._prompts_only = False
        first = decode_cycle(self._costs, batch, context, taken, taken_tokens)
        growth = 0.0
        if steps > 1:
            last = decode_cycle(self._costs, batch, context + (steps - 1) * batch)
            growth = (last - first) / (steps - 1)
        self._begin(steps, first, growth)

    def _begin_mixed(self) -> None:
        """One step in which prompts (or parts of them) run along with the decoding sequences.

        Without chunked prefill they run alone, and the decoding sequences wait.
        """
        self._prompts_only = not self._mixes
        batch = 0 if self._prompts_only else len(self._running)
        context = 0 if self._prompts_only else self._context + batch
        room = max(1, self._budget - batch)
        tokens, squares, begun = 0, 0, 0
        for sequence in self._prefilling:
            done = sequence.done_prompt
            chunk = min(sequence.pending - done, room - tokens)
            if chunk <= 0:
                break
            self._chunks.append((sequence, chunk))
            begun += done == 0 and sequence.generated == 0
            tokens += chunk
            squares += (done + chunk) ** 2 - done**2
        # A chunk that does not end its prompt has its last token multiplied with the LM head too, for nothing.
        sequences = batch + len(self._chunks)
        taken, taken_tokens = (0, 0) if self._prompts_only else self._take_over()
        seconds = cycle_seconds(
            self._costs,
            sequences,
            batch + tokens,
            float(squares),
            context,
            sequences,
            begun,
            taken,
            taken_tokens,
        )
        self._begin(1, seconds, 0.0)

    def _take_over(self) -> tuple[int, int]:
        """The KV caches that the step that begins takes over, and their tokens."""
        taken = self._taken, self._taken_tokens
        self._taken = self._taken_tokens = 0
        return taken

    def _begin(self, steps: int, first_s: float, growth_s: float) -> None:
        self._start = self._events.now
        self._steps, self._first_s, self._growth_s = steps, first_s, growth_s
        if not self._prompts_only:
            for sequence in self._without_token:
                if sequence.number in self._running:  # and not preempted at once
                    sequence.first = self._start + first_s
            self._without_token.clear()
        self._call_at_end()

    def _call_at_end(self) -> None:
        self._version += 1
        self._events.at(self._start + self._seconds(self._steps), self._end, self._version)

    def _seconds(self, steps: int) -> float:
        """Seconds of the run's first ``steps`` steps: an arithmetic series."""
        return steps * self._first_s + self._growth_s * steps * (steps - 1) / 2

    def _steps_within(self, seconds: float) -> int:
        """How many whole steps of the run fit into ``seconds``: the series solved for its length."""
        half = self._growth_s / 2
        linear = self._first_s - half
        # 2c / (b + √(b² + 4ac)) is exact for a = 0 too.
        steps = int(2 * seconds / (linear + sqrt(linear * linear + 4 * half * seconds)))
        return min(max(steps, 0), self._steps - 1)

    def _catch_up(self) -> None:
        """Count the steps that are over by now; at least the last step of the run stays under way."""
        steps = self._steps_within(self._events.now - self._start)
        if steps:
            seconds = self._seconds(steps)
            self.busy_s += seconds
            self._start += seconds
            self._first_s += steps * self._growth_s
            self._steps -= steps
            self._progress(steps)

    def _cut_to(self, steps: int) -> None:
        """End the run after ``steps`` more steps, the one under way counted, if it would last longer."""
        if steps < self._steps:
            self._steps = max(1, steps)
            self._call_at_end()

    def _progress(self, steps: int) -> None:
        if self._prompts_only:
            return
        batch = len(self._running)
        self.blocks.advance(steps)
        self._context += steps * batch
        self.output_tokens += steps * batch
        self.steps += steps
        self.sequence_steps += steps * batch

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        now = self._events.now
        self.busy_s += now - self._start
        self._progress(self._steps)
        self._steps = 0
        ended: list[Sequence] = []
        ends = self._ends
        while ends and ends[0][0] <= self.blocks.step:
            step, _, sequence = heappop(ends)
            if sequence.finish_step == step and sequence.number in self._running:
                self._leave(sequence)
                sequence.generated = sequence.outputs
                ended.append(sequence)
        for sequence, chunk in self._chunks:
            sequence.done_prompt += chunk
            self.prompt_tokens += chunk
            if sequence.done_prompt == sequence.pending:
                self._finish_prompt(sequence, now, ended)
        self._chunks.clear()
        for sequence in ended:
            sequence.end = now
            self.requests += 1
            self._done(sequence)
        if not self._steps:  # `done` may have brought new work and begun the next run
            self._go_on()

    def _finish_prompt(self, sequence: Sequence, now: float, ended: list[Sequence]) -> None:
        """The last chunk of a prompt gives a token; the sequence decodes from now on, or ends."""
        self._prefilling.remove(sequence)
        context = sequence.pending
        sequence.pending = 0
        sequence.generated += 1
        self.output_tokens += 1
        if sequence.first != sequence.first:
            sequence.first = now
            if sequence.path is None or sequence.path.prefill is None:
                sequence.prefilled = now
        if sequence.generated == sequence.outputs:
            self.blocks.release(sequence.blocks)
            ended.append(sequence)
        else:
            self._join(sequence, context)
