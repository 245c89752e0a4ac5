"""The gate before the second leg."""

from __future__ import annotations

import asyncio
import random

import pytest

from hexgen2.coordinator.gate import Gate
from tests.waiting import until


class Visitors:
    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.go: dict[str, asyncio.Event] = {}

    async def come(self, name: str, priority: int = 0) -> None:
        go = self.go[name] = asyncio.Event()

        async def visit() -> None:
            async with self.gate.turn(priority):
                self.order.append(name)
                await go.wait()

        self.tasks[name] = asyncio.create_task(visit())
        await asyncio.sleep(0)

    async def leave(self, *names: str) -> None:
        for name in names:
            self.go[name].set()
            await self.tasks[name]
        await asyncio.sleep(0)


async def test_no_more_than_the_limit_and_in_order_of_priority() -> None:
    visitors = Visitors(Gate(2))
    for name, priority in (("a", 0), ("b", 0), ("c", 1), ("d", 0), ("e", -1)):
        await visitors.come(name, priority)
    assert (visitors.order, visitors.gate.inside, visitors.gate.waiting) == (["a", "b"], 2, 3)
    await visitors.leave("a", "b", "e", "d", "c")
    assert visitors.order == ["a", "b", "e", "d", "c"]
    assert visitors.gate.inside == 0


async def test_a_closed_gate_lets_one_in_and_the_rest_when_it_opens() -> None:
    state = [False]
    visitors = Visitors(Gate(5, lambda: state[0]))
    for name in "abc":
        await visitors.come(name)
    assert visitors.order == ["a"]
    state[0] = True
    visitors.gate.refill()
    await asyncio.sleep(0)
    assert visitors.order == ["a", "b", "c"]
    await visitors.leave("a", "b", "c")


async def test_who_waits_can_be_sent_away() -> None:
    visitors = Visitors(Gate(1))
    for name in "abc":
        await visitors.come(name)
    visitors.gate.fail_waiting(lambda: RuntimeError("down"))
    for name in "bc":
        with pytest.raises(RuntimeError, match="down"):
            await visitors.tasks[name]
    await visitors.leave("a")
    assert (visitors.gate.inside, visitors.gate.waiting) == (0, 0)


async def test_leaving_while_waiting_loses_no_turn() -> None:
    visitors = Visitors(Gate(1))
    for name in "abc":
        await visitors.come(name)
    visitors.go["a"].set()
    await asyncio.sleep(0)
    visitors.tasks["b"].cancel()  # at the very moment at which its turn is given
    await until(lambda: visitors.order == ["a", "c"])
    await visitors.leave("c")
    assert visitors.gate.inside == 0


@pytest.mark.parametrize("seed", range(10))
async def test_random_visits_keep_count(seed: int) -> None:
    dice, gate, peak = random.Random(seed), Gate(3), 0

    async def visit() -> None:
        nonlocal peak
        async with gate.turn(dice.randrange(2)):
            peak = max(peak, gate.inside)
            await asyncio.sleep(dice.random() * 0.002)

    tasks = []
    for _ in range(80):
        tasks.append(asyncio.create_task(visit()))
        await asyncio.sleep(dice.random() * 0.0005)
        if dice.random() < 0.3:
            dice.choice(tasks).cancel()
        if dice.random() < 0.05:
            gate.fail_waiting(lambda: RuntimeError("down"))
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (gate.inside, gate.waiting) == (0, 0)
    assert peak <= 3
