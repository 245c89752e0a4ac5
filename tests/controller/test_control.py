"""The whole loop on emulated engines under load: drift, node loss and return, restarts, roll-back, dry run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from hexgen2.controller.control import Watching
from hexgen2.controller.decide import Policy
from hexgen2.controller.replan import Effort
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Plan
from hexgen2.specs.workload import Lengths
from tests.controller.stand import Load, Stand, planned, serving, slow_model
from tests.scheduler.support import A100, L40, cluster
from tests.waiting import HUNG_S, until

QUICK = Policy(
    horizon_s=600.0,
    restart_s=2.0,
    confirm=2,
    cooldown_s=1.0,
    grace_s=0.6,
    settle_s=4.0,
    look_s=1.0,
    drain_s=20.0,
)
ALERT = Watching(interval_s=0.4, window_s=5.0, at_least=12, effort=Effort(warm_s=0.3, fresh_s=0.3))
COST = slow_model(slowness=1.0, batch=8)


def load(prompt: int, answer: int) -> Lengths:
    """Lengths within a quarter of the means."""
    rng = np.random.default_rng(0)
    return Lengths(
        rng.integers(round(0.75 * prompt), round(1.25 * prompt) + 1, 64),
        rng.integers(round(0.75 * answer), round(1.25 * answer) + 1, 64),
    )


PROMPTS, ANSWERS = load(300, 4), load(20, 24)


@cache
def nodes() -> Cluster:
    return cluster((A100, 2), (A100, 2), (L40, 2), gbps=100.0)


@cache
def plan_for(prompts: bool) -> Plan:
    return planned(nodes(), PROMPTS if prompts else ANSWERS, COST)


OLD = ("p0", "p1", "p2", "p3", "p4", "d0")


def patient(policy: Policy) -> Policy:
    """Restarts cost a lot, so that what starts nothing is taken where it nearly suffices."""
    return replace(policy, restart_s=120.0, sufficient=0.85)


def adapted(stand: Stand) -> Callable[[], bool]:
    """Whether the plan of the moment carries 90% of what the best one for the new load does."""
    return lambda: stand.controller.plan.throughput_rps >= 0.9 * plan_for(False).throughput_rps


async def test_a_load_that_turns_is_answered_by_flips_and_nothing_is_lost() -> None:
    async with serving(plan_for(True), PROMPTS, COST, policy=patient(QUICK), watching=ALERT) as stand:
        load = Load(stand.coordinator.url, PROMPTS, clients=60)
        async with load.running():
            await asyncio.sleep(2.0)
            load.lengths = ANSWERS
            await until(adapted(stand), 2 * HUNG_S)
            await load.more(50)
    assert load.lost == []
    assert "flip" in stand.actions
    assert "replan" not in stand.actions
    assert stand.groups.started == list(OLD)  # and none since


async def test_losing_a_node_loses_no_request_and_its_return_is_used() -> None:
    plan = plan_for(False)
    gone = sorted(group.id for group in plan.groups if group.gpus[0].startswith("n0/"))
    assert len(gone) == 2
    async with serving(plan, ANSWERS, COST, policy=patient(QUICK), watching=ALERT) as stand:
        load = Load(stand.coordinator.url, ANSWERS, clients=40)
        async with load.running():
            await asyncio.sleep(2.0)
            for name in gone:
                stand.groups.engines[name].kill()

            def answered() -> bool:
                shares = {group.id: group.share for group in stand.controller.plan.groups}
                return not any(shares.get(name) for name in gone)

            await until(answered)
            await load.more()
            seen = stand.coordinator.metrics.registry.get_sample_value
            assert 0 < (seen("hexgen2:plan_capacity_rps") or 0) < plan.throughput_rps
            for name in gone:
                await stand.groups.revive(plan, name)
            await until(lambda: not answered())
            await load.more()
    assert load.lost == []
    assert any("came or went" in decision.text for decision in stand.decisions)


@pytest.mark.slow
async def test_a_dry_run_tells_and_changes_nothing() -> None:
    async with serving(
        plan_for(True), PROMPTS, COST, policy=patient(QUICK), watching=ALERT, mode="dry-run"
    ) as stand:
        load = Load(stand.coordinator.url, ANSWERS, clients=60)
        async with load.running():
            await until(lambda: "flip" in stand.actions)
            await asyncio.sleep(1.0)
        assert stand.controller.plan is plan_for(True)
        assert {engine.endpoint.role for engine in stand.coordinator.fleet.engines.values()} == {
            "prefill",
            "decode",
        }
    assert load.lost == []


@pytest.mark.slow
async def test_groups_that_do_not_start_leave_things_as_they_were() -> None:
    async with serving(plan_for(True), PROMPTS, COST, policy=QUICK, watching=ALERT, flips=False) as stand:
        stand.groups.able = set(OLD)
        load = Load(stand.coordinator.url, ANSWERS, clients=60)
        async with load.running():
            await until(lambda: len(stand.groups.started) > len(OLD))
            await asyncio.sleep(1.0)
            assert await load.rate(3.0) > 0
        assert stand.actions == ["replan"]
        assert set(stand.groups.started) == set(OLD)
        assert sorted(stand.groups.ended) == sorted(stand.groups.started[len(OLD) :])
        assert {group.id for group in stand.controller.plan.groups} == set(OLD)
    assert load.lost == []


@pytest.mark.slow
async def test_engines_that_keep_their_roles_are_replaced_one_part_after_the_other() -> None:
    async with serving(plan_for(True), PROMPTS, COST, policy=QUICK, watching=ALERT, flips=False) as stand:
        load = Load(stand.coordinator.url, PROMPTS, clients=60)
        async with load.running():
            await asyncio.sleep(2.0)
            load.lengths = ANSWERS
            await until(adapted(stand), within_s=60.0)
            await asyncio.sleep(1.0)
            assert await load.rate(5.0) > 0.6 * plan_for(False).throughput_rps
    assert load.lost == []
    assert "replan" in stand.actions
    assert load.longest_gap_s < 10.0


@pytest.mark.slow
async def test_a_change_that_serves_less_is_taken_back() -> None:
    """Requests that crawl are not waited for: they begin anew elsewhere."""
    hasty = replace(QUICK, drain_s=2.0)
    async with serving(plan_for(True), PROMPTS, COST, policy=hasty, watching=ALERT, flips=False) as stand:
        load = Load(stand.coordinator.url, ANSWERS, clients=60)
        stand.groups.cost = slow_model(slowness=20.0, batch=8)  # what is started from now on crawls
        async with load.running():
            await until(lambda: "roll_back" in stand.actions, within_s=90.0)
            stand.groups.cost = COST
            await until(lambda: {group.id for group in stand.controller.plan.groups} == set(OLD))
            assert await load.rate(4.0) > 0
    assert load.lost == []
