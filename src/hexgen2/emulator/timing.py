"""How long an emulated engine takes: the seam through which the cost model drives it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from hexgen2.cost.capacity import cycle_seconds, handover_wait
from hexgen2.cost.stage import StageCost


@dataclass(frozen=True)
class Work:
    """What one iteration carries: ``prompt_tokens`` of ``prompts`` prompts (or chunks of them) with Σ of their
    squares' growth ``squares``, and ``batch`` sequences that decode over ``context`` tokens together. Of these,
    ``begun`` prompts begin, and ``taken`` sequences go on from KV caches of ``taken_tokens`` tokens in all that
    came from elsewhere."""

    prompts: int
    prompt_tokens: int
    squares: int
    batch: int
    context: int
    begun: int = 0
    taken: int = 0
    taken_tokens: int = 0


class Timing(Protocol):
    """Seconds an engine spends on each kind of work. Implementations are pure."""

    @property
    def depth(self) -> int:
        """How many batches are under way at once, one in each stage that `stages_s` tells of."""
        ...

    def stages_s(self, work: Work) -> Sequence[float]:
        """Seconds that an iteration keeps each stage busy, one after another."""
        ...

    def kv_transfer_s(self, tokens: int) -> float:
        """Seconds until the KV cache of `tokens` prompt tokens has arrived from another engine."""
        ...

    def handover_wait_s(self, tokens: int) -> float:
        """Seconds that a request waits for such a cache beyond its transfer."""
        ...

    def sending_s(self, tokens: int) -> Sequence[float]:
        """Seconds that sending the KV cache of so many tokens takes from each stage's iterations."""
        ...


@dataclass(frozen=True)
class LinearTiming:
    """Affine in the tokens: enough for tests and for load that needs no particular GPU."""

    prefill_base_s: float = 0.001
    prefill_per_token_s: float = 0.0
    step_base_s: float = 0.001
    step_per_sequence_s: float = 0.0
    step_per_context_token_s: float = 0.0
    kv_per_token_s: float = 0.0
    send_per_token_s: float = 0.0

    @property
    def depth(self) -> int:
        return 1

    def stages_s(self, work: Work) -> Sequence[float]:
        seconds = self.step_base_s + (work.batch + work.prompts) * self.step_per_sequence_s
        seconds += (work.context + work.prompt_tokens) * self.step_per_context_token_s
        if work.prompts:
            seconds += self.prefill_base_s + work.prompt_tokens * self.prefill_per_token_s
        return (seconds,)

    def kv_transfer_s(self, tokens: int) -> float:
        return tokens * self.kv_per_token_s

    def handover_wait_s(self, tokens: int) -> float:
        return 0.0 * tokens

    def sending_s(self, tokens: int) -> Sequence[float]:
        return (tokens * self.send_per_token_s,)


@dataclass(frozen=True)
class ModelledTiming:
    """The cost model's times of a serving group: ``costs`` of its stages.

    A pipeline that prefills (``prefill``) begins a batch as soon as its first stage is free; one that decodes
    runs its micro-batches in cycles, as `cost.capacity.cycle_seconds` counts them. ``slowdown``: everything
    takes that many times as long, so that one machine keeps up with many engines.
    """

    costs: Sequence[StageCost]
    prefill: bool = False
    slowdown: float = 1.0

    @property
    def depth(self) -> int:
        return len(self.costs) if self.prefill else 1

    def stages_s(self, work: Work) -> Sequence[float]:
        sequences = work.batch + work.prompts
        tokens = work.batch + work.prompt_tokens
        if self.prefill:
            load = (tokens, work.squares, work.context, sequences, work.begun)
            return [self.slowdown * cost.seconds(*load) for cost in self.costs]
        seconds = cycle_seconds(
            self.costs,
            sequences,
            tokens,
            work.squares,
            work.context,
            sequences,
            work.begun,
            work.taken,
            work.taken_tokens,
        )
        return (self.slowdown * seconds,)

    def kv_transfer_s(self, tokens: int) -> float:
        """Nothing: transfers take the time of the links they share (see `fleet`)."""
        return 0.0 * tokens

    def handover_wait_s(self, tokens: int) -> float:
        return self.slowdown * handover_wait(self.costs, tokens)

    def sending_s(self, tokens: int) -> Sequence[float]:
        return [self.slowdown * cost.sending_s(1, tokens) for cost in self.costs]


class Transfers(Protocol):
    """What moves KV caches between engines."""

    async def move(self, source: str, tokens: int) -> None:
        """Return when the KV cache of ``tokens`` tokens has come from the engine named ``source``."""
        ...


@dataclass(frozen=True)
class TimedTransfers(Transfers):
    """Each transfer takes what a timing says, whatever else is under way."""

    timing: Timing

    @override
    async def move(self, source: str, tokens: int) -> None:
        await asyncio.sleep(self.timing.kv_transfer_s(tokens))
