"""The emulated engine's iterations: what they carry, and what becomes of sequences when memory is short."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import pytest
from tests.waiting import HUNG_S, until

from hexgen2.cost import CostModel, Efficiencies, Profile, StageShape, default_efficiency
from hexgen2.emulator import tokens
from hexgen2.emulator.engine import EngineCore, Sequence
from hexgen2.emulator.memory import KvMemory
from hexgen2.emulator.timing import LinearTiming, ModelledTiming, Work
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model


@dataclass(frozen=True)
class Recorded(LinearTiming):
    """A timing that takes no time and keeps what it was asked for."""

    works: list[Work] = field(default_factory=list)

    stages: int = 1

    @property
    def depth(self) -> int:
        return self.stages

    def stages_s(self, work: Work) -> list[float]:
        self.works.append(work)
        return [0.0] * self.stages


@dataclass(frozen=True)
class Stuck(Recorded):
    """A pipeline of three stages, the second of which takes for ever."""

    stages: int = 3

    def stages_s(self, work: Work) -> list[float]:
        self.works.append(work)
        return [0.0, 1e6, 0.0]


async def finished(core: EngineCore, sequences: list[Sequence]) -> list[list[int]]:
    """Run the sequences to their ends; their tokens."""

    async def collect(sequence: Sequence) -> list[int]:
        found = []
        while (token := await sequence.queue.get()) is not None:
            found.append(token)
        return found

    core.start()
    for sequence in sequences:
        core.submit(sequence)
    try:
        async with asyncio.timeout(HUNG_S):
            return list(await asyncio.gather(*map(collect, sequences)))
    finally:
        await core.stop()


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("budget", [7, 40, 1000])
async def test_iterations_keep_to_the_budget_and_compute_every_prompt_once(budget: int, stages: int) -> None:
    timing = Recorded(stages=stages)
    prompts = [list(range(size)) for size in (30, 1, 55, 12, 9)]
    core = EngineCore(timing, max_batch=5, token_budget=budget)
    got = await finished(core, [Sequence(prompt, 6) for prompt in prompts])
    assert got == [tokens.generate(prompt, 6) for prompt in prompts]
    assert all(work.batch + work.prompt_tokens <= max(budget, work.batch + 1) for work in timing.works)
    assert sum(work.prompt_tokens for work in timing.works) == sum(map(len, prompts))
    assert sum(work.squares for work in timing.works) == sum(len(prompt) ** 2 for prompt in prompts)
    assert core.memory.used == 0


async def test_prompts_go_beside_decoding_sequences() -> None:
    timing = Recorded()
    await finished(EngineCore(timing, max_batch=2, token_budget=10), [Sequence([1], 9), Sequence([2] * 30, 1)])
    assert timing.works[1] == Work(prompts=1, prompt_tokens=9, squares=18**2 - 9**2, batch=1, context=3)


async def test_a_fetched_cache_is_not_computed() -> None:
    timing = Recorded()
    core = EngineCore(timing, max_batch=4)
    assert core.memory.try_take(2)
    await finished(core, [Sequence([3] * 20, 4, kv_ready=True, blocks=2)])
    assert timing.works == [Work(0, 0, 0, 1, 21 + step, taken=step == 0) for step in range(4)]


async def test_the_last_to_come_gives_up_its_memory_and_starts_over() -> None:
    timing = Recorded()
    core = EngineCore(timing, max_batch=4, memory=KvMemory(96, 16))
    prompts = [[5] * 40, [6] * 40]  # three blocks each: the fourth is not there for both
    got = await finished(core, [Sequence(prompt, 30) for prompt in prompts])
    assert got == [tokens.generate(prompt, 30) for prompt in prompts]
    assert core.preemptions_total > 0
    assert sum(work.prompt_tokens for work in timing.works) > 80
    assert core.memory.used == 0


async def test_a_prompt_waits_until_another_engine_has_fetched_one() -> None:
    core = EngineCore(Recorded(), max_batch=4, memory=KvMemory(48, 16))
    first, second = Sequence([5] * 40, 1, keeps_blocks=True), Sequence([6] * 40, 1)
    core.start()
    core.submit(first)
    core.submit(second)
    assert await first.queue.get() is not None
    await asyncio.sleep(0.01)
    assert second in core.waiting
    core.memory.give(first.blocks)
    async with asyncio.timeout(HUNG_S):
        assert await second.queue.get() is not None
    await core.stop()


async def test_memory_is_given_in_the_order_of_asking() -> None:
    memory = KvMemory(160, 16)
    assert memory.try_take(8)
    large = asyncio.create_task(memory.take(5))
    small = asyncio.create_task(memory.take(1))
    await asyncio.sleep(0)
    assert not memory.try_take(1), "nobody overtakes"
    assert memory.grow(1), "but who runs may grow"
    memory.give(4)
    await asyncio.sleep(0)
    assert large.done()
    assert not small.done()
    assert memory.used == 10
    memory.give(5)
    await small
    assert memory.used == 6


@pytest.mark.parametrize("when", ["waiting", "given"])
async def test_who_leaves_while_waiting_takes_nothing(when: str) -> None:
    memory = KvMemory(32, 16)
    assert memory.try_take(2)
    gone, stays = asyncio.create_task(memory.take(2)), asyncio.create_task(memory.take(1))
    await asyncio.sleep(0)
    if when == "given":
        memory.give(2)
    gone.cancel()
    await asyncio.sleep(0)
    if when == "waiting":
        memory.give(2)
    await stays
    assert memory.used == 1


def test_modelled_times_are_the_cost_models() -> None:
    gpu, model = gpu_type("A100-80G-SXM"), load_model("llama-2-13b")
    cost = CostModel(model)
    layout = (StageShape(gpu, 2, 20, gpu.link), StageShape(gpu, 1, 20, upstream=gpu.link))
    costs = cost.compiled(layout).costs
    prefill = ModelledTiming(costs, prefill=True, slowdown=3)
    assert prefill.depth == 2
    assert prefill.stages_s(Work(1, 1000, 1000**2, 0, 0)) == pytest.approx(
        [3 * seconds for seconds in cost.prefill_stage_seconds(layout, [1000])]
    )
    decode = ModelledTiming(costs, slowdown=3)
    assert decode.depth == 1
    assert decode.stages_s(Work(0, 0, 0, 16, 16 * 800)) == pytest.approx(
        [3 * cost.decode_step_seconds(layout, 16, 16 * 800)]
    )


def test_modelled_hand_overs_are_the_cost_models() -> None:
    gpu, model = gpu_type("A100-80G-SXM"), load_model("llama-2-13b")
    update = {"handoff_overhead_s": 0.01, "handoff_byte_s": 1e-9, "handoff_wait_s": 0.02, "send_byte_s": 2e-9}
    slow = default_efficiency(gpu).model_copy(update=update)
    profile = Profile(name="slow", source="", date="", engine="", gpus={gpu.name: slow})
    layout = (StageShape(gpu, 2, 40, gpu.link),)
    timing = ModelledTiming(CostModel(model, Efficiencies([profile])).compiled(layout).costs, slowdown=3)
    held = 800 * model.kv_bytes_per_token / 2
    alone, taking = (
        timing.stages_s(Work(0, 0, 0, 16, 16 * 800, taken=taken, taken_tokens=taken * 800))[0]
        for taken in (0, 1)
    )
    assert taking - alone == pytest.approx(3 * (0.01 + held * 1e-9))
    assert timing.handover_wait_s(800) == pytest.approx(3 * 0.02)
    assert timing.sending_s(800) == pytest.approx([3 * held * 2e-9])


async def test_sending_a_cache_keeps_the_next_prompt_waiting() -> None:
    core = EngineCore(Recorded(send_per_token_s=0.005), max_batch=2)
    core.start()
    core.sent(10)
    began = time.monotonic()
    core.submit(prompt := Sequence([1] * 10, 1))
    await until(lambda: prompt.generated == 1)
    assert time.monotonic() - began > 0.04
    assert core.busy_s == pytest.approx(0.05)
    await core.stop()


async def test_a_pipeline_has_a_batch_in_every_stage_and_no_more() -> None:
    """Of three stages the first takes no time, the second for ever: three of five prompts begin."""
    timing = Stuck()
    core = EngineCore(timing, max_batch=8, token_budget=10)
    core.start()
    for _ in range(5):
        core.submit(Sequence([1] * 10, 1))
    await until(lambda: len(timing.works) >= 3)
    await asyncio.sleep(0.02)
    assert [work.prompt_tokens for work in timing.works] == [10, 10, 10]
    await core.stop()


async def test_a_cache_is_asked_for_when_the_iteration_under_way_is_over() -> None:
    timing = Recorded()
    core = EngineCore(timing, max_batch=2)
    await asyncio.wait_for(core.between_iterations(), 5)  # an idle engine does not keep anyone waiting
    sequence = Sequence([1] * 10, 10**6)
    core.start()
    core.submit(sequence)
    for _ in range(3):
        await until(lambda: len(timing.works) > sequence.generated)
        under_way = len(timing.works)
        async with asyncio.timeout(5):
            await core.between_iterations()
        assert sequence.generated >= under_way
    await core.stop()
