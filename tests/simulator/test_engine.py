"""The engine in closed form against one that goes step by step and counts every sequence."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.cost import CostModel, Settings, StageShape
from hexgen2.cost.capacity import cycle_seconds
from hexgen2.cost.memory import Memory
from hexgen2.cost.replica import Compiled
from hexgen2.simulator.batching import Engine
from hexgen2.simulator.events import Events
from hexgen2.simulator.sequence import Sequence
from hexgen2.specs import GpuType, Link, Model

GPU = GpuType(
    name="g",
    vendor="nvidia",
    generation="ampere",
    memory_bytes=2e9,
    flops=1e12,
    dense_dtype="bf16",
    memory_bandwidth=100e9,
    link_kind="test",
    link=Link(bandwidth=10e9, latency=1e-5),
)
MODEL = Model(
    name="m",
    layers=4,
    hidden_size=512,
    heads=4,
    kv_heads=4,
    head_dim=128,
    intermediate_size=1024,
    vocab_size=1000,
    max_positions=4096,
)
COSTS = CostModel(MODEL).compiled((StageShape(GPU, 1, 4),)).costs


@dataclass
class Slow:
    """A sequence of the step-by-step engine."""

    number: int
    inputs: int
    outputs: int
    arrival: float
    pending: int
    done: int = 0
    cached: int = 0
    generated: int = 0
    held: int = 0
    first: float | None = None
    end: float | None = None


def step_by_step(
    requests: list[tuple[float, int, int]], total: int, size: int, budget: int, most: int, chunked: bool
) -> list[Slow]:
    """The same rules, with no closed form: each step is gone through, each sequence's blocks are counted.

    ``chunked``: prompts and decoding sequences share steps; else a step has prompts alone where there are any.
    """
    sequences = [Slow(n, i, o, at, pending=i) for n, (at, i, o) in enumerate(requests)]
    coming, waiting, prefilling, running = list(sequences), [], [], []
    time = 0.0

    def used() -> int:
        return sum(each.held for each in (*prefilling, *running))

    def admit(spare: int) -> None:
        if running and not chunked:
            spare = max(sum(ceil((e.cached + 1) / size) - e.held for e in running), ceil(0.01 * total))
        while waiting and len(running) + len(prefilling) < most:
            needed = ceil(waiting[0].pending / size)
            if used() + needed + spare > total:
                return
            each = waiting.pop(0)
            each.held, each.done = needed, 0
            prefilling.append(each)

    while coming or waiting or prefilling or running:
        if not (waiting or prefilling or running):
            time = max(time, coming[0].arrival)
        while coming and coming[0].arrival <= time:
            waiting.append(coming.pop(0))
            admit(0)
        admit(0)
        while running and used() + sum(ceil((e.cached + 1) / size) - e.held for e in running) > total:
            each = running.pop()
            each.pending, each.held = each.inputs + each.generated, 0
            waiting.insert(0, each)
        growth = sum(ceil((e.cached + 1) / size) - e.held for e in running)
        decoding = list(running) if chunked or not prefilling else []
        room, chunks, squares = max(1, budget - len(decoding)), [], 0
        for each in prefilling:
            chunk = min(each.pending - each.done, room - sum(size_ for _, size_ in chunks))
            if chunk > 0:
                chunks.append((each, chunk))
                squares += (each.done + chunk) ** 2 - each.done**2
        batch = len(decoding)
        context = sum(e.cached for e in decoding) + batch
        tokens = batch + sum(chunk for _, chunk in chunks)
        seconds = cycle_seconds(COSTS, batch + len(chunks), tokens, squares, context, batch + len(chunks))
        end = time + seconds
        while coming and coming[0].arrival < end:
            waiting.append(coming.pop(0))
            admit(growth)
        time = end
        for each in decoding:
            each.cached += 1
            each.held = ceil(each.cached / size)
            each.generated += 1
            if each.generated == each.outputs:
                each.end = time
                running.remove(each)
        for each, chunk in chunks:
            each.done += chunk
            if each.done == each.pending:
                prefilling.remove(each)
                each.cached, each.pending = each.pending, 0
                each.generated += 1
                each.first = each.first or time
                if each.generated == each.outputs:
                    each.end = time
                else:
                    running.append(each)
    return sequences


def closed_form(
    requests: list[tuple[float, int, int]],
    total: int,
    size: int,
    budget: int,
    most: int,
    chunked: bool = True,
) -> tuple[list[Sequence], Engine]:
    events = Events()
    given_settings = Settings(token_budget=budget, block_size=size, chunked_prefill=chunked)
    compiled = Compiled(COSTS, Memory((), (), (), (), size), total * size)
    engine = Engine(events, compiled, given_settings, most, done=lambda _: None)
    sequences = [Sequence(n, i, o, at, pending=i) for n, (at, i, o) in enumerate(requests)]
    for sequence in sequences:
        events.at(sequence.arrival, engine.submit, sequence)
    while events.step():
        pass
    return sequences, engine


@settings(max_examples=150, deadline=None)
@given(
    gaps=st.lists(
        st.tuples(st.floats(0, 0.05), st.integers(1, 120), st.integers(1, 60)), min_size=1, max_size=12
    ),
    total=st.integers(30, 120),
    budget=st.sampled_from([16, 64, 300]),
    most=st.sampled_from([2, 5, 32]),
    size=st.sampled_from([7, 16]),
    chunked=st.booleans(),
)
def test_against_step_by_step(
    gaps: list[tuple[float, int, int]], total: int, budget: int, most: int, size: int, chunked: bool
) -> None:
    arrivals = np.cumsum([gap for gap, _, _ in gaps]).tolist()
    requests = [(at, i, o) for at, (_, i, o) in zip(arrivals, gaps, strict=True)]
    expected = step_by_step(requests, total, size, budget, most, chunked)
    found, engine = closed_form(requests, total, size, budget, most, chunked)
    for slow, fast in zip(expected, found, strict=True):
        assert fast.first == pytest.approx(slow.first, rel=1e-9)
        assert fast.end == pytest.approx(slow.end, rel=1e-9)
    assert engine.output_tokens == sum(o for _, _, o in requests)
    assert engine.blocks.used == 0
    assert engine.blocks.peak <= total


def test_the_cases_include_preemption() -> None:
    """The comparison above is worth little if memory never runs out in it."""
    requests = [(0.0, 100, 60)] * 6
    _, engine = closed_form(requests, total=50, size=16, budget=300, most=32)
    assert engine.preemptions > 0
    assert engine.prompt_tokens > 600


def test_decode_alone_takes_the_sum_of_its_steps() -> None:
    (sequence,), engine = closed_form([(1.0, 10, 5)], total=100, size=16, budget=300, most=4)
    prefill = cycle_seconds(COSTS, 1, 10, 100, 0, 1)
    steps = [cycle_seconds(COSTS, 1, 1, 0, 10 + j, 1) for j in range(1, 5)]
    assert sequence.first == pytest.approx(1 + prefill)
    assert sequence.end == pytest.approx(1 + prefill + sum(steps))
    assert engine.busy_s == pytest.approx(prefill + sum(steps))
