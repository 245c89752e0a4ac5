"""What users of a plan would see at a given arrival rate: waits, latencies, and whether the rate is carried.

The same closed forms as `goodput` (cost.goodput), with each group and link at the load that the rate puts on
it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from math import inf, sqrt
from statistics import NormalDist

import numpy as np

from hexgen2.cost.goodput import ATTAINMENT, steps_to_token
from hexgen2.cost.queues import (
    After,
    AnswerQueue,
    PromptQueue,
    SharedQueue,
    SharedState,
    answer_queue,
    prompt_queue,
    shared_queue,
)
from hexgen2.scheduler.layouts import layout_of
from hexgen2.scheduler.problem import Problem
from hexgen2.scheduler.restore import restored
from hexgen2.specs.plan import Latency, Plan, RatePrediction

LONGEST_S = 1e4
"""Latencies are looked for up to that."""
FULLEST = 0.99
"""Load of a link beyond which a transfer's time is no longer worked out."""
_NORMAL = NormalDist()


@dataclass(frozen=True)
class _Path:
    """One way of the plan at a rate: its share, and what its requests see.

    ``first`` and ``steady`` give the part of the requests whose first token comes within a time, and whose
    tokens take at most a time each; ``placed`` the part that finds a place to decode at once.
    """

    share: float
    first: Callable[[float], float]
    first_mean: float
    steady: Callable[[float], float]
    steady_mean: float
    placed: float


def predict(problem: Problem, plan: Plan, rate: float) -> RatePrediction:
    """The plan at ``rate`` requests/s, all requests routed alike; without latencies where a group or link
    cannot keep up."""
    paths = _paths(problem, plan, rate)
    if paths is None:
        return RatePrediction(rate_rps=rate, carried=False)
    slo = plan.slo
    attainment = None
    if slo.ttft_s is not None or slo.tpot_s is not None:
        ttft, tpot = slo.ttft_s or LONGEST_S, slo.tpot_s or LONGEST_S
        attainment = sum(path.share * path.first(ttft) * path.steady(tpot) * path.placed for path in paths)
    return RatePrediction(
        rate_rps=rate,
        carried=attainment is None or attainment >= ATTAINMENT,
        attainment=attainment,
        ttft_s=_latency([(path.share, path.first, path.first_mean) for path in paths]),
        tpot_s=_latency([(path.share, path.steady, path.steady_mean) for path in paths]),
    )


def _paths(problem: Problem, plan: Plan, rate: float) -> list[_Path] | None:
    """The plan's paths at a rate; None where something cannot keep up."""
    alike, evaluator, solution = restored(replace(problem, objective="throughput"), plan)
    cost, moments = alike.cost, alike.cost.moments(alike.lengths)
    prompts: dict[str, PromptQueue] = {}
    answers: dict[str, AnswerQueue] = {}
    found: list[_Path] = []
    options = {}
    for group, option in zip(plan.groups, solution.options, strict=True):
        assert option is not None, "a group of a plan has a layout"
        options[group.id] = option
        layout, own = layout_of(evaluator.topology, option.template), rate * group.share
        costs = cost.compiled(layout).costs
        if group.role == "prefill":
            batch = max(1, cost.prefill_capacity(layout, moments).batch_requests)
            prompts[group.id] = prompt_queue(costs, moments, batch, cost.settings)
        elif group.role == "decode":
            answers[group.id] = answer_queue(costs, moments, group.max_batch)
            if answers[group.id].full(own) >= 1:
                return None
        else:
            shared = shared_queue(costs, moments, group.max_batch, own, cost.settings)
            state = shared.at(own)
            if state is None or shared.answers.full(own, state.stretch, state.own_s) >= 1:
                return None
            found.append(_colocated(shared, state, own, group.share))
    loads = {
        (route.source, route.target): evaluator.loads(options[route.source], options[route.target])
        for route in plan.routes
    }
    busy: dict[Hashable, float] = {}
    for route in plan.routes:
        for name, seconds in loads[route.source, route.target]:
            busy[name] = busy.get(name, 0.0) + rate * route.share * seconds
    if max(busy.values(), default=0.0) > FULLEST:
        return None
    for route in plan.routes:
        if route.share <= 0:
            continue
        queue, answer = prompts[route.source], answers[route.target]
        own = rate * plan.group_by_id[route.target].share
        batch_size = answer.mean_batch(own)
        slowest = max(seconds / (1 - busy[name]) for name, seconds in loads[route.source, route.target])
        after = After(steps_to_token(cost.settings) * answer.step(batch_size), slowest / moments.input)
        path = _disaggregated(
            queue, rate * plan.group_by_id[route.source].share, answer, own, after, route.share
        )
        if path is None:
            return None
        found.append(path)
    return found


def _colocated(shared: SharedQueue, state: SharedState, rate: float, share: float) -> _Path:
    wait = state.queue.wait(rate)
    assert wait is not None, "the state says that it keeps up"
    mean = float(state.queue.alone_s.mean()) + state.queue.server.fixed_s + wait.busy * wait.mean
    return _Path(
        share=share,
        first=lambda seconds: shared.prompt_met(rate, state, seconds),
        first_mean=mean,
        steady=lambda seconds: shared.steady(rate, state, seconds),
        steady_mean=shared.answers.step(state.batch) * state.stretch,
        placed=1 - shared.answers.full(rate, state.stretch, state.own_s),
    )


def _disaggregated(
    queue: PromptQueue, prompt_rate: float, answer: AnswerQueue, rate: float, after: After, share: float
) -> _Path | None:
    wait = queue.wait(prompt_rate)
    if wait is None:
        return None
    batch = answer.mean_batch(rate)
    mean = float((queue.alone_s + queue.prompts * after.per_token_s).mean()) + after.fixed_s
    sizes = np.arange(1, len(answer.steps_s) + 1)

    def steady(seconds: float) -> float:
        """The number of sequences varies as a Poisson one does, and with it the time of a step."""
        if seconds >= answer.steps_s[-1]:
            return 1.0
        if seconds < answer.steps_s[0]:
            return 0.0
        size = float(np.interp(seconds, answer.steps_s, sizes))
        return _NORMAL.cdf((size - batch) / sqrt(max(batch, 1e-9)))

    return _Path(
        share=share,
        first=lambda seconds: queue.met(prompt_rate, seconds, after),
        first_mean=mean + wait.busy * wait.mean,
        steady=steady,
        steady_mean=answer.step(batch),
        placed=1 - answer.full(rate),
    )


def _latency(parts: list[tuple[float, Callable[[float], float], float]]) -> Latency:
    """Mean and percentiles of a mixture of distribution functions."""
    whole = sum(share for share, _, _ in parts)

    def below(seconds: float) -> float:
        return sum(share * part(seconds) for share, part, _ in parts) / whole

    def quantile(level: float) -> float | None:
        low, high = 0.0, 1e-3
        while below(high) < level:
            low, high = high, 2 * high
            if high > LONGEST_S:
                return None
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if below(middle) >= level else (middle, high)
        return high

    mean = sum(share * mean for share, _, mean in parts) / whole
    return Latency(mean=mean if mean < inf else None, p50=quantile(0.5), p90=quantile(0.9))
