"""What requests wait for in a group of each role: prompts for a batch, answers for a place, or both at once.

The queues take their figures from a layout's stage costs and the lengths of requests; `cost.queueing` has the
formulas, `cost.goodput` asks them for rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, sqrt

import numpy as np

from hexgen2.cost.capacity import decode_cycle, prefill_latency, prefill_times, with_sending
from hexgen2.cost.memory import Settings
from hexgen2.cost.moments import Moments
from hexgen2.cost.queueing import (
    BatchServer,
    FloatArray,
    attained,
    full_probability,
    stretched_exceeds,
)
from hexgen2.cost.stage import StageCost

CRITICAL_LOAD = {3: 0.70, 4: 0.50, 5: 0.39, 6: 0.36}
"""Load at which half of the time the prompts of a pipeline of so many stages (or more) are clumped."""
CRITICAL_WIDTH = 0.05
GRID = 9


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait: its probability, then its mean and standard deviation in seconds."""

    busy: float
    mean: float
    deviation: float


@dataclass(frozen=True, slots=True)
class After:
    """What comes between the end of a prefill and the first token: seconds, and seconds per prompt token."""

    fixed_s: float = 0.0
    per_token_s: float = 0.0


NOTHING = After()


@dataclass(frozen=True, eq=False)
class PromptQueue:
    """Prompts that wait for the batch under way and then share one with those that came meanwhile.

    ``server``: what a batch takes at the slowest stage; ``others_s``: what a prompt costs the other stages
    together. ``alone_s``: how long each of the representative ``prompts`` (tokens) takes from start to end in a
    batch of its own.
    """

    server: BatchServer
    others_s: float
    prompts: FloatArray
    alone_s: FloatArray

    def wait(self, rate: float) -> Wait | None:
        """How much later than alone on an idle group a prompt's batch ends; None when there is no end to it.

        It falls into a round of length L (long ones are met more often), whose rest it waits. Its own batch
        holds what came in all of L, at most a token budget: of what is beyond, batches before it are waited for
        too, so that only prompts that came after it can cost it less than all of them.
        """
        server = self.server
        found = server.rounds(rate)
        if found is None:
            return None
        seen, load, beside = found.seen, rate * server.mean_s, rate * self.others_s
        later = min(load / 2, server.full_s / 2 / seen)
        beside = min(beside, server.full_s * self.others_s / server.mean_s / seen)
        mates = load / 2 + later + beside
        mean = (0.5 + mates) * seen
        spread = found.square / (found.mean * found.mean) - 1  # L of a gamma-distributed round
        seen_square = found.mean**2 * (1 + spread) * (1 + 2 * spread)
        square = (1 / 3 + mates + mates * mates) * seen_square
        if load > 0:
            square += rate * server.square_s * seen * (mates / load) ** 2
        deviation = sqrt(max(0.0, square - mean * mean))
        waits = Wait(found.busy, mean + (server.stages - 1) * found.lag, deviation)
        return max(waits, self.clumped(load), key=lambda wait: wait.mean)

    def clumped(self, load: float) -> Wait:
        """The wait in a pipeline whose prompts clump.

        A batch much larger than the next ones holds them up in every stage, and all that comes meanwhile, about
        S times its length, gathers into the next large batch. From three stages on this feeds itself at loads
        far below 1, until batches are as large as the token budget lets them be, and a prompt then passes S
        full batches. Whether a group is in that state is a matter of chance near the critical load. The
        critical loads and the width were read off the simulator (benchmarks/queueing.py), which batches as vLLM
        does.
        """
        server = self.server
        if server.stages not in CRITICAL_LOAD and server.stages <= max(CRITICAL_LOAD):
            return Wait(0.0, 0.0, 0.0)
        critical = CRITICAL_LOAD[min(server.stages, max(CRITICAL_LOAD))]
        part = 1 / (1 + exp((critical - load) / CRITICAL_WIDTH))
        whole = server.stages * server.full_s
        return Wait(1.0, whole * part, whole * max(0.2 * part, 0.8 * sqrt(part * (1 - part))))

    def met(self, rate: float, ttft_s: float, after: After = NOTHING) -> float:
        """Part of the requests whose first token comes within ``ttft_s``."""
        slack = ttft_s - after.fixed_s - self.prompts * after.per_token_s - self.alone_s
        if rate <= 0:
            return float((slack >= 0).mean())
        found = self.wait(rate)
        if found is None:
            return 0.0
        return attained(slack, found.busy, found.mean, found.deviation)


@dataclass(frozen=True, eq=False)
class AnswerQueue:
    """Sequences that decode together in at most ``len(steps_s)`` places; ``steps_s[n − 1]`` seconds a token for
    n of them, ``output`` tokens each in the mean."""

    steps_s: FloatArray
    output: float

    def full(self, rate: float, stretch: float = 1.0, before_s: float = 0.0) -> float:
        """Probability that a request finds no place. ``stretch``: how much longer steps take for other work;
        ``before_s``: how long a request has its place before it decodes."""
        return full_probability(rate, self.steps_s * (self.output * stretch) + before_s)

    def mean_batch(self, rate: float, stretch: float = 1.0) -> float:
        """Sequences in service in the mean: the number n that its own residence n = λ·o·t(n) keeps up."""
        rates, sizes = self._rates, self._sizes
        rate *= stretch
        return rate / float(rates[0]) if rate < rates[0] else float(np.interp(rate, rates, sizes))

    def vary(self, batch: float) -> float:
        """Coefficient of variation of a step's time when the number of sequences varies as a Poisson one
        does."""
        return self.step(batch + sqrt(batch)) / self.step(batch) - 1

    def step(self, batch: float) -> float:
        """Seconds a token in a batch of that mean size."""
        return float(np.interp(batch, self._sizes, self.steps_s))

    @cached_property
    def _sizes(self) -> FloatArray:
        return np.arange(1, len(self.steps_s) + 1, dtype=np.float64)

    @cached_property
    def _rates(self) -> FloatArray:
        """Requests/s that batches of each size carry."""
        return self._sizes / (self.output * self.steps_s)


@dataclass(frozen=True, slots=True)
class SharedState:
    """A colocated group at a rate: the prompts' queue, sequences that decode, seconds of own work in a step,
    how much steps are stretched by prompts, and the seconds that a prompt's own step takes."""

    queue: PromptQueue
    batch: float
    work_s: float
    stretch: float
    own_s: float


@dataclass(frozen=True, eq=False)
class SharedQueue:
    """A colocated group: prompts and answers on one server.

    Prompts run in steps together with the decoding sequences, so a step that carries one lasts as long as its
    chunk, for all of them, and prompts wait for the step under way. ``lone_s``: how long each representative
    prompt takes when nothing else runs, where that is longer: a pipeline has no second micro-batch then.
    """

    prompts: PromptQueue
    answers: AnswerQueue
    outputs: tuple[float, ...]
    lone_s: FloatArray | None = None

    def at(self, rate: float) -> SharedState | None:
        """How the group works at a rate; None when it cannot keep up.

        A step of n sequences takes a(n) without prompts and a(n) + c with them, besides what each prompt adds.
        n, the length of steps and the part of them without prompts depend on each other.
        """
        load = rate * self.prompts.server.mean_s
        if load >= 1:
            return None
        stretch = 1 / (1 - load)
        queue, work, batch, own = self.prompts, 0.0, 0.0, 0.0
        for _ in range(3):
            batch = self.answers.mean_batch(rate, stretch)
            step = self.answers.step(batch)
            server = replace(
                self.prompts.server, fixed_s=max(0.0, step + self.prompts.server.fixed_s), idle_s=step
            )
            queue = replace(self.prompts, server=server)
            found = server.rounds(rate)
            if found is None:
                return None
            work = found.empty * step + (1 - found.empty) * server.fixed_s
            stretch = work / step / (1 - load)
            own = server.fixed_s + server.mean_s + load * found.seen
        return SharedState(queue, batch, work, stretch, own)

    def met(self, rate: float, ttft_s: float, tpot_s: float, needed: float = 0.0) -> float:
        """Part of the requests that meet both targets (the two taken as independent); where it is seen to be
        less than ``needed``, some number above the part."""
        state = self.at(rate)
        if state is None:
            return 0.0
        part = self.prompt_met(rate, state, ttft_s)
        if part >= needed:
            part *= 1 - self.answers.full(rate, state.stretch, state.own_s)
        if part >= needed and part > 0:
            part *= self.steady(rate, state, tpot_s)
        return part

    def prompt_met(self, rate: float, state: SharedState, ttft_s: float) -> float:
        """Part of the requests that have their first token in time once they have a place."""
        queue, after = state.queue, After(state.queue.server.fixed_s)
        part = queue.met(rate, ttft_s, after)
        if self.lone_s is None:
            return part
        idle = exp(-state.batch - rate * state.own_s)
        return (1 - idle) * part + idle * replace(queue, alone_s=self.lone_s).met(rate, ttft_s, after)

    def steady(self, rate: float, state: SharedState, tpot_s: float) -> float:
        """Part of the answers whose tokens take at most ``tpot_s`` each in the mean."""
        late, server = 0.0, self.prompts.server
        vary, work_s = self.answers.vary(state.batch), state.work_s
        for tokens in self.outputs:
            gaps = tokens - 1
            if gaps > 0:
                late += stretched_exceeds(
                    gaps * work_s, rate, server.mean_s, server.square_s, gaps * tpot_s, vary
                )
        return 1 - late / len(self.outputs)


def prompt_queue(
    costs: Sequence[StageCost], moments: Moments, batch: int, settings: Settings, beside: float = 0.0
) -> PromptQueue:
    """The queue of a layout. ``batch``: mean prompts in a batch at saturation; ``beside``: decoding sequences
    that share its steps (their own time is left out), or wait for them without chunked prefill.

    The time of a batch is linear in what it carries but for the reading of weights; the line goes through one
    mean prompt and a full batch.
    """
    budget = settings.token_budget

    def times(count: float) -> list[float]:
        tokens, squares = count * moments.input, count * moments.input_sq
        if not beside:
            return with_sending(costs, prefill_times(costs, tokens, squares, count, budget)[1], count, tokens)
        micro = len(costs)
        if not settings.chunked_prefill:
            return [cost.seconds(tokens / micro, squares / micro, 0.0, count / micro) for cost in costs]
        return [
            cost.seconds(
                (beside + tokens) / micro,
                squares / micro,
                beside * moments.context / micro,
                (beside + count) / micro,
                count / micro,
            )
            - cost.seconds(beside / micro, 0.0, beside * moments.context / micro, beside / micro)
            for cost in costs
        ]

    one = times(1.0)
    many = times(float(batch)) if batch > 1 else one
    slowest = max(range(len(many)), key=many.__getitem__)
    # A pipeline takes a step's prompts in as many micro-batches as it has stages, one in each at a time.
    weight = len(costs) if beside else 1
    each = [(b - a) / (batch - 1) for a, b in zip(one, many, strict=True)] if batch > 1 else one
    fixed = weight * (one[slowest] - each[slowest])
    # Reading weights alone may take all the time, beside decoding sequences exactly so.
    alone_s = prefill_times(costs, moments.input, moments.input_sq, 1.0, budget)[1][slowest]
    mean = weight * max(each[slowest], 1e-6 * alone_s)
    # Work of a prompt of s tokens: u·s + v·s², with the shares of both in the mean prompt as the stage has
    # them.
    cost = costs[slowest]
    quadratic = (cost.dense_layers + cost.moe_layers) * cost.attention_s
    linear = max(0.0, (mean - quadratic * moments.input_sq) / moments.input)
    prompts = np.array(moments.prompts)
    work = linear * prompts + quadratic * prompts**2
    work *= mean / work.mean()
    alone = work if beside else _alone(costs, prompts, budget)
    server = BatchServer(
        fixed_s=fixed,
        mean_s=mean,
        square_s=float((work * work).mean()),
        stages=1 if beside else len(costs),
        full_s=mean * budget / moments.input,
    )
    return PromptQueue(server, 0.0 if beside else sum(each) - each[slowest], prompts, alone)


def _alone(costs: Sequence[StageCost], prompts: FloatArray, budget: int) -> FloatArray:
    """`prefill_latency` of each prompt by itself: the formula of `StageCost.seconds` on an array."""
    total = np.zeros(len(prompts))
    for cost in costs:
        attention = prompts * prompts * cost.attention_s
        total += cost.fixed_s + prompts * cost.token_s
        if cost.dense_layers:
            total += cost.dense_layers * np.maximum(prompts * cost.dense_token_s + attention, cost.dense_read_s)
        if cost.moe_layers:
            read = cost.moe_read_s - cost.expert_read_s * cost.experts * np.expm1(
                prompts * cost.expert_miss_log
            )
            total += cost.moe_layers * np.maximum(prompts * cost.moe_token_s + attention, read)
        if cost.head_read_s:
            total += max(cost.head_token_s, cost.head_read_s) + cost.gather_s
    for place in np.flatnonzero(prompts > budget):
        tokens = float(prompts[place])
        total[place] = prefill_latency(*prefill_times(costs, tokens, tokens * tokens, 1.0, budget))
    return total


def answer_queue(
    costs: Sequence[StageCost], moments: Moments, places: int, *, colocated: bool = False
) -> AnswerQueue:
    """The decoding of a layout; step times between `GRID` sizes are interpolated (they are nearly straight)."""
    sizes = np.unique(np.rint(np.geomspace(1, places, GRID)).astype(int))
    taken = 0.0 if colocated else 1 / moments.output
    known = [
        decode_cycle(costs, int(size), int(size) * moments.context, size * taken, size * taken * moments.input)
        for size in sizes
    ]
    steps = np.interp(np.arange(1, places + 1), sizes, np.array(known))
    return AnswerQueue(steps, moments.output)


def shared_queue(
    costs: Sequence[StageCost], moments: Moments, places: int, rate: float, settings: Settings
) -> SharedQueue:
    """A colocated layout near a rate (what a prompt adds to a step depends a little on the step's batch)."""
    answers = answer_queue(costs, moments, places, colocated=True)
    beside = max(1.0, answers.mean_batch(rate))
    room = len(costs) * settings.token_budget - beside
    batch = max(1, int(room / moments.input))
    prompts = prompt_queue(costs, moments, batch, settings, beside)
    lone = _alone(costs, prompts.prompts, settings.token_budget) if len(costs) > 1 else None
    return SharedQueue(prompts, answers, moments.answers, lone)
