"""Real engines change between prefill and decode under load, without being started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hexgen2.coordinator import Coordinator, CoordinatorConfig, RouteShare, kv_transfer_totals
from hexgen2.deploy import EngineOptions
from tests.deploy.builders import cluster, group, plan
from tests.engine.fleet import PROMPTS, Fleet, completion, running

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    devices = cluster(("a", "cpu-1c", 1), ("b", "cpu-1c", 1))
    groups = [group("p0", "prefill", (["a/0"], 8)), group("d0", "decode", (["b/0"], 8))]
    made = plan(devices, groups, ("p0", "d0", 1.0), model="tiny-llama", engine="vllm-asymmetric")
    options = EngineOptions(connector="hexgen")
    async with running(made, tmp_path_factory.mktemp("flip"), options=options) as fleet:
        yield fleet


def turned(config: CoordinatorConfig) -> CoordinatorConfig:
    """The same engines with their roles exchanged."""
    other = {"prefill": "decode", "decode": "prefill"}
    engines = tuple(engine.model_copy(update={"role": other[engine.role]}) for engine in config.engines)
    routes = tuple(RouteShare(prefill=r.decode, decode=r.prefill, share=r.share) for r in config.routes)
    return config.model_copy(update={"engines": engines, "routes": routes})


async def test_roles_are_exchanged_under_load_and_every_answer_stays_the_same(fleet: Fleet) -> None:
    # Both legs of a request at once, so that caches are on their way in both directions.
    first = fleet.deployment.coordinator.model_copy(update={"overlap_kv": True})
    async with Coordinator(first).running() as door:

        async def ask(prompt: str) -> list[int]:
            async with fleet.http.post(door.url + "/v1/completions", json=completion(prompt)) as response:
                assert response.status == 200, await response.text()
                answer = await response.json()
            return list(answer["choices"][0]["token_ids"])

        expected = {prompt: await ask(prompt) for prompt in PROMPTS}
        urls = {engine.id: engine.endpoint.url for engine in door.fleet.engines.values()}
        before = await kv_transfer_totals(urls, fleet.http)
        began, asked = time.perf_counter(), 0
        for config in (turned(first), first, turned(first)):
            under_way = [asyncio.create_task(ask(prompt)) for prompt in PROMPTS]
            await asyncio.sleep(0.05)
            await door.update(config)
            under_way += [asyncio.create_task(ask(prompt)) for prompt in PROMPTS]
            for prompt, task in zip((*PROMPTS, *PROMPTS), under_way, strict=True):
                assert await task == expected[prompt], prompt
            asked += len(under_way)
        print(f"\n{asked} requests over three exchanges of roles in {time.perf_counter() - began:.1f} s")
        await ask(PROMPTS[0])  # the counters follow with the engine's next steps
        after = await kv_transfer_totals(urls, fleet.http)
    assert after["p0"].bytes > before["p0"].bytes == 0.0  # it receives caches now
    assert all(total.failed == total.expired == 0 for total in after.values())
