"""A plan's emulated engines: the settings of its groups, and KV caches over its links."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from hexgen2.cost import CostModel
from hexgen2.emulator.fleet import RealTime, SharedLinks, engines_of
from hexgen2.emulator.timing import ModelledTiming
from hexgen2.simulator.network import Network
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.plan import Plan, load_plan

PLAN = Path(__file__).parents[1] / "simulator" / "plan_20_gpus.json"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(PLAN)


async def test_every_group_has_its_engine(plan: Plan) -> None:
    cost = CostModel(load_model(plan.model))
    engines = engines_of(plan, cost)
    assert set(engines) == {group.id for group in plan.groups}
    for group in plan.groups:
        config = engines[group.id].config
        assert (config.role, config.name, config.max_batch) == (group.role, group.id, group.max_batch)
        assert isinstance(config.timing, ModelledTiming)
        assert len(config.timing.costs) == len(group.stages)
        assert config.kv_tokens > 0
        assert (config.transfers is not None) == (group.role == "decode")


async def test_a_request_goes_over_a_route_of_the_plan(plan: Plan) -> None:
    cost = CostModel(load_model(plan.model))
    route = plan.routes[0]
    engines = engines_of(plan, cost, slowdown=0.01)
    prefill, decode = engines[route.source], engines[route.target]
    body = {"prompt": list(range(100)), "max_tokens": 1}
    async with prefill.running(), decode.running(), aiohttp.ClientSession() as http:

        async def ask(url: str, **more: object) -> dict[str, dict[str, object]]:
            async with http.post(url + "/v1/completions", json={**body, **more}) as response:
                answer: dict[str, dict[str, object]] = await response.json()
                return answer

        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        leg1 = await ask(prefill.url, kv_transfer_params=asked)
        assert prefill.core.memory.used == 7, "its KV cache is held until it is fetched"
        await ask(decode.url, kv_transfer_params=leg1["kv_transfer_params"], max_tokens=4)
        assert prefill.core.memory.used == decode.core.memory.used == 0
        assert decode.kv_bytes == pytest.approx(100 * cost.model.kv_bytes_per_token, rel=1e-6)


async def test_transfers_share_a_link_fairly() -> None:
    """Two of 100 tokens at 1000 bytes/s and 1 byte per token: both end when all 200 bytes are through."""
    clock = RealTime(slowdown=0.5)
    network = Network(clock, {("p0", "d0"): {"wire": 1.0}}, {("p0", "d0"): 0.0}, {"wire": 1000.0})
    links = SharedLinks(network, "d0", frozenset({"p0"}))
    began = clock.now
    await asyncio.gather(links.move("p0", 100), links.move("p0", 100))
    assert clock.now - began >= 0.2
    await links.move("elsewhere", 10**9)  # no route: nothing to wait for


async def test_who_leaves_during_a_transfer_harms_nobody() -> None:
    network = Network(RealTime(), {("p0", "d0"): {"wire": 1.0}}, {("p0", "d0"): 0.0}, {"wire": 1000.0})
    links = SharedLinks(network, "d0", frozenset({"p0"}))
    leaves, stays = (asyncio.create_task(links.move("p0", 20)) for _ in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    await stays
