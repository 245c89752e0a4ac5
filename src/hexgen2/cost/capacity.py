"""How many requests per second a compiled layout sustains in each role.

Every iteration time t(b) here is a sum of terms c + a·b and max(c, a·b) with a, c ≥ 0 (and of the experts
touched, which is concave), so b/t(b) never falls as b grows: the best batch is the largest one allowed. And
t(b) itself never falls, so the largest batch under a latency target is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import expm1, floor, sqrt

from hexgen2.cost.memory import Settings
from hexgen2.cost.moments import Moments
from hexgen2.cost.stage import StageCost


@dataclass(frozen=True, slots=True)
class PrefillCapacity:
    """``latency_s``: one mean request alone. ``batch_requests``: mean requests in a batch at saturation.

    ``max_batch``: sequences that the engine may run at once, more than ``batch_requests``: every stage
    has a batch under way, and short prompts fill the token budget with more of them.
    """

    rps: float
    latency_s: float
    batch_requests: int
    bottleneck_stage: int
    max_batch: int


@dataclass(frozen=True, slots=True)
class DecodeCapacity:
    """``tpot_s``: seconds per token at ``max_batch``. ``kv_limited``: KV memory is what bounds the batch."""

    rps: float
    max_batch: int
    tpot_s: float
    kv_limited: bool


@dataclass(frozen=True, slots=True)
class ColocatedCapacity:
    """As DecodeCapacity; ``latency_s``: prefill of one mean request alone."""

    rps: float
    max_batch: int
    tpot_s: float
    latency_s: float
    kv_limited: bool


def prefill_times(
    costs: Sequence[StageCost], tokens: float, squares: float, requests: float, budget: int
) -> tuple[list[float], list[float]]:
    """(seconds of each stage for the first chunk, for all) of ``tokens`` prompt tokens with Σs² = ``squares``.

    More tokens than the budget are cut into chunks of the budget and a rest; each reads the weights again.
    """
    if tokens <= budget:
        times = [cost.seconds(tokens, squares, 0.0, requests, requests) for cost in costs]
        return times, times
    whole, rest = divmod(tokens, budget)
    squares, requests = squares / tokens, requests / tokens
    chunk = requests * budget
    first = [cost.seconds(budget, squares * budget, 0.0, chunk, chunk) for cost in costs]
    total = [whole * seconds for seconds in first]
    if rest:
        for stage, cost in enumerate(costs):
            total[stage] += cost.seconds(rest, squares * rest, 0.0, requests * rest, requests * rest)
    return first, total


def prefill_latency(first: Sequence[float], total: Sequence[float]) -> float:
    """Seconds from start to end: the first chunk passes all stages, the others follow the slowest.

    Example: stages of 3 and 1 s per chunk, two chunks: 3 + 1 for the first, 3 more for the second.
    """
    return sum(first) + max(everything - one for everything, one in zip(total, first, strict=True))


def with_sending(
    costs: Sequence[StageCost], times: Sequence[float], requests: float, tokens: float
) -> list[float]:
    """The seconds of each stage for prompts, and for sending their KV caches to decode groups."""
    return [busy + cost.sending_s(requests, tokens) for busy, cost in zip(times, costs, strict=True)]


def decode_cycle(
    costs: Sequence[StageCost], batch: float, context: float, taken: float = 0.0, taken_tokens: float = 0.0
) -> float:
    """Seconds in which each of ``batch`` sequences with ``context`` tokens in all gets one token; ``taken`` of
    them go on from a KV cache that came from elsewhere, of ``taken_tokens`` tokens in all.

    p stages run min(p, batch) micro-batches. A micro-batch comes around when it has passed all stages, and when
    each of the others has passed the slowest one.
    """
    return cycle_seconds(costs, batch, batch, 0.0, context, batch, taken=taken, taken_tokens=taken_tokens)


def handover_wait(costs: Sequence[StageCost], tokens: float) -> float:
    """Seconds that a request of ``tokens`` tokens waits for its KV cache beyond the links' time: that of the
    stage that it takes longest to reach."""
    return max(cost.wait_s + tokens * cost.wait_token_s for cost in costs)


def cycle_seconds(
    costs: Sequence[StageCost],
    sequences: float,
    tokens: float,
    squares: float,
    context: float,
    yields: float,
    begun: float = 0.0,
    taken: float = 0.0,
    taken_tokens: float = 0.0,
) -> float:
    """Seconds in which an iteration's work (see `StageCost.seconds`) passes a pipeline of p stages.

    It is cut evenly into min(p, sequences) micro-batches, one in each stage at a time.

    Example: two stages of 3 and 1 s per micro-batch: two micro-batches take 2 × 3 s, a single one 3 + 1 s.
    """
    micro = min(len(costs), sequences)
    total = slowest = 0.0
    for cost in costs:
        seconds = cost.seconds(
            tokens / micro,
            squares / micro,
            context / micro,
            yields / micro,
            begun / micro,
            taken / micro,
            taken_tokens / micro,
        )
        total += seconds
        slowest = max(slowest, seconds)
    return max(total, micro * slowest)


def prefill_capacity(
    costs: Sequence[StageCost], moments: Moments, max_tokens: int, settings: Settings
) -> PrefillCapacity:
    """1 / (seconds that the slowest stage spends per request), in batches that fill the token budget and whose
    KV caches it sends.

    ``max_tokens``: KV tokens that fit, which may ask for a smaller budget (`Settings.prefill_budget`). No
    capacity when the longest prompt does not fit.
    """
    budget = settings.prefill_budget(max_tokens, len(costs))
    first, alone = prefill_times(costs, moments.input, moments.input_sq, 1.0, budget)
    latency = prefill_latency(first, alone)
    slowest = max(range(len(alone)), key=alone.__getitem__)
    if moments.longest_input > max_tokens:
        return PrefillCapacity(0.0, latency, 0, slowest, 0)
    batch = max(1, min(settings.max_batch, floor(budget / moments.input)))
    _, busy = prefill_times(costs, batch * moments.input, batch * moments.input_sq, batch, budget)
    times = with_sending(costs, busy, batch, batch * moments.input)
    slowest = max(range(len(times)), key=times.__getitem__)
    most = max(batch, min(settings.max_batch, floor(max_tokens / moments.input)))
    return PrefillCapacity(batch / times[slowest], latency, batch, slowest, most)


def decode_capacity(
    costs: Sequence[StageCost],
    moments: Moments,
    max_tokens: int,
    settings: Settings,
    tpot_s: float | None = None,
) -> DecodeCapacity:
    """max b/(E[s_out]·t_cycle(b)) over the batches b that fit the memory, max_batch and the TPOT target.

    In balance b/E[s_out] requests come with each cycle, in place of those that end.
    """

    def cycle(batch: int) -> float:
        taken = batch / moments.output
        return decode_cycle(costs, batch, batch * moments.context, taken, taken * moments.input)

    batch, kv_limited = _largest_batch(cycle, moments, max_tokens, settings, settings.max_batch, tpot_s)
    seconds = cycle(max(1, batch))
    return DecodeCapacity(batch / (moments.output * seconds), batch, seconds, kv_limited)


def colocated_capacity(
    costs: Sequence[StageCost],
    moments: Moments,
    max_tokens: int,
    settings: Settings,
    tpot_s: float | None = None,
) -> ColocatedCapacity:
    """The same with prefill in the same iterations (chunked prefill).

    In balance a request comes for each that leaves: a = b/E[s_out] prompts per iteration of b decoding
    sequences, whose tokens must stay within the budget (per micro-batch) in the mean. Prompts come whole and by
    chance (Poisson): a part q = 1 − e^(−a) of the iterations carries a/q prompts, the others none. The mean of
    the two is longer than an iteration with a prompts: one is bound by computing, the other by reading weights.
    Without chunked prefill the part q of the iterations has one more before it, of the a/q prompts alone.
    """
    prompts = 1 / moments.output  # prompts that an iteration completes, per decoding sequence

    def cycle(batch: int) -> float:
        context = batch * moments.context
        part = -expm1(-batch * prompts)
        count = batch * prompts / part
        alone = cycle_seconds(costs, batch, batch, 0.0, context, batch)
        tokens, squares = count * moments.input, count * moments.input_sq
        if not settings.chunked_prefill:
            return alone + part * cycle_seconds(costs, count, tokens, squares, 0.0, count, begun=count)
        mixed = cycle_seconds(
            costs, batch + count, batch + tokens, squares, context, batch + count, begun=count
        )
        return part * mixed + (1 - part) * alone

    first, alone = prefill_times(costs, moments.input, moments.input_sq, 1.0, settings.token_budget)
    latency = prefill_latency(first, alone)
    within_budget = floor(len(costs) * settings.token_budget / (1 + prompts * moments.input))
    most = max(1, min(settings.max_batch, within_budget))
    # The prompt under way holds blocks too.
    spare = max_tokens - round(moments.input) if max_tokens >= moments.longest else 0
    batch, kv_limited = _largest_batch(cycle, moments, spare, settings, most, tpot_s)
    if max_tokens >= moments.longest and batch == 0 and (tpot_s is None or cycle(1) <= tpot_s):
        batch, kv_limited = 1, True
    seconds = cycle(max(1, batch))
    return ColocatedCapacity(batch / (moments.output * seconds), batch, seconds, latency, kv_limited)


def resident_tokens(moments: Moments, settings: Settings) -> float:
    """Tokens of KV cache that a sequence in the batch holds in the mean: its context, and half a block more
    since its last block is half full on average."""
    return moments.context + (settings.block_size - 1) / 2


def memory_batch(moments: Moments, max_tokens: int, settings: Settings) -> int:
    """Sequences whose contexts fit into ``max_tokens``, with the headroom of the settings.

    The largest b with b·μ + z·σ·√b ≤ max_tokens, μ and σ of a resident sequence (`resident_tokens`); at least 1
    when the longest request fits, else 0.
    """
    if moments.longest > max_tokens:
        return 0
    mean = resident_tokens(moments, settings)
    spread = settings.headroom_sigmas * moments.context_std
    root = (sqrt(spread * spread + 4 * mean * max_tokens) - spread) / (2 * mean)
    return max(1, floor(root * root + 1e-9))


def _largest_batch(
    cycle: Callable[[int], float],
    moments: Moments,
    max_tokens: int,
    settings: Settings,
    most: int,
    tpot_s: float | None,
) -> tuple[int, bool]:
    """(largest batch within memory, ``most`` and the TPOT target, whether memory is what bounds it)."""
    fitting = memory_batch(moments, max_tokens, settings)
    batch = min(fitting, most)
    kv_limited = fitting < most
    if tpot_s is None or batch == 0 or cycle(batch) <= tpot_s:
        return batch, kv_limited
    low, high = 0, batch  # the target holds at low (0: trivially) and fails at high
    while high - low > 1:
        middle = (low + high) // 2
        if cycle(middle) <= tpot_s:
            low = middle
        else:
            high = middle
    return low, False
