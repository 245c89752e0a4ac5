"""Drift at 20 groups, against the best plan for the new load, measured on the same emulated engines."""

from __future__ import annotations

import asyncio

import pytest

from hexgen2.controller.assess import assess
from hexgen2.controller.control import Watching
from hexgen2.controller.decide import Policy
from hexgen2.controller.process import OtherProcess
from hexgen2.controller.replan import Effort
from hexgen2.specs.plan import Plan
from tests.controller.stand import Load, planned, serving, slow_model
from tests.controller.test_control import load
from tests.scheduler.support import A100, L40, cluster
from tests.waiting import until

NODES = cluster((A100, 4), (A100, 4), (A100, 4), (L40, 4), (L40, 4), gbps=100.0)
COST = slow_model(slowness=3.0, batch=8)
PROMPTS, ANSWERS = load(300, 4), load(20, 24)
CLIENTS = 240
POLICY = Policy(
    horizon_s=900.0,
    restart_s=120.0,  # of engines that load weights; what is emulated starts at once
    sufficient=0.9,
    confirm=2,
    cooldown_s=2.0,
    grace_s=1.0,
    settle_s=10.0,
    look_s=2.0,
)
ALERT = Watching(interval_s=1.0, window_s=12.0, at_least=40, effort=Effort(2.0, 2.0))


async def measured(plan: Plan, seconds: float) -> float:
    """Requests/s of the new load that a plan serves from the start on."""
    async with serving(plan, ANSWERS, COST, policy=POLICY, watching=ALERT, mode="dry-run") as stand:
        load = Load(stand.coordinator.url, ANSWERS, CLIENTS)
        async with load.running():
            await asyncio.sleep(25.0)
            rate = await load.rate(seconds)
    assert load.lost == []
    return rate


@pytest.mark.slow
async def test_throughput_recovers_to_that_of_the_best_plan_by_flips_alone() -> None:
    first, best = planned(NODES, PROMPTS, COST), planned(NODES, ANSWERS, COST)
    assert len(first.groups) == len(best.groups) == 20
    work = OtherProcess(assess)
    try:
        async with serving(first, PROMPTS, COST, policy=POLICY, watching=ALERT, work=work) as stand:
            load = Load(stand.coordinator.url, PROMPTS, CLIENTS)
            async with load.running():
                await asyncio.sleep(15.0)
                load.lengths = ANSWERS
                await until(
                    lambda: stand.controller.plan.throughput_rps >= 0.9 * best.throughput_rps, within_s=240.0
                )
                await asyncio.sleep(25.0)
                after = await load.rate(40.0)
    finally:
        work.close()
    reference = await measured(best, 40.0)
    print(f"\nafter the turn {after:.2f} requests/s, the best plan from the start {reference:.2f}")
    for decision in stand.decisions:
        print(f"{decision.text} ({decision.numbers.get('assessed_in_s', 0):.1f} s)")
    assert load.lost == []
    assert "flip" in stand.actions
    assert "replan" not in stand.actions
    assert after >= 0.9 * reference


@pytest.mark.slow
async def test_a_lost_node_of_20_groups_is_planned_around_within_ten_seconds() -> None:
    plan = planned(NODES, ANSWERS, COST)
    gone = [group.id for group in plan.groups if group.gpus[0].startswith("n0/")]
    assert len(gone) == 4
    work = OtherProcess(assess)
    try:
        async with serving(plan, ANSWERS, COST, policy=POLICY, watching=ALERT, work=work) as stand:
            load = Load(stand.coordinator.url, ANSWERS, CLIENTS)
            async with load.running():
                await asyncio.sleep(10.0)
                for name in gone:
                    stand.groups.engines[name].kill()

                def answered() -> bool:
                    groups = stand.controller.plan.group_by_id
                    return all(groups[name].share == 0 for name in gone if name in groups)

                took = await until(answered, within_s=60.0)
                assert await load.rate(10.0) > 0
    finally:
        work.close()
    print(f"\nplanned around after {took:.1f} s, longest silence {load.longest_gap_s:.1f} s")
    assert load.lost == []
    assert took < 10.0
