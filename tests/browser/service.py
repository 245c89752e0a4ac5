"""A plan on emulated engines in this process, a coordinator before them, and some load."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count

import aiohttp

from hexgen2.coordinator import ApiKeys, Coordinator
from hexgen2.cost import CostModel
from hexgen2.cost.profile_files import load_efficiencies
from hexgen2.deploy import coordinator_config
from hexgen2.emulator import EmulatedEngine
from hexgen2.emulator.fleet import engines_of
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.plan import Plan


@dataclass
class Service:
    """What a test drives."""

    plan: Plan
    coordinator: Coordinator
    engines: dict[str, EmulatedEngine]

    @property
    def url(self) -> str:
        return self.coordinator.url

    async def lose(self, group: str) -> None:
        """The group's engine is gone."""
        await self.engines[group].stop()

    async def revive(self, group: str, port: int) -> None:
        await self.engines[group].start(port)

    @contextlib.asynccontextmanager
    async def loaded(self, clients: int = 6, key: str | None = None) -> AsyncIterator[None]:
        """Clients that stream one short answer after the other, each to another prompt (a prompt that a decode
        engine has in its prefix cache would not be sent)."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        numbers = count()

        async def client(http: aiohttp.ClientSession) -> None:
            while True:
                prompt = [next(numbers), *range(400)]
                body = {"model": self.plan.model, "prompt": prompt, "max_tokens": 8, "stream": True}
                async with http.post(f"{self.url}/v1/completions", json=body) as answer:
                    await answer.read()

        async with aiohttp.ClientSession(headers=headers) as http:
            tasks = [asyncio.create_task(client(http)) for _ in range(clients)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def serving(
    plan: Plan, keys: ApiKeys | None = None, slowdown: float = 0.2, port: int = 0
) -> AsyncIterator[Service]:
    """The plan, served."""
    cost = CostModel(load_model(plan.model), load_efficiencies(plan.profiles))
    engines = engines_of(plan, cost, (plan.model,), slowdown)
    async with AsyncExitStack() as stack:
        for engine in engines.values():
            await engine.start()
            stack.push_async_callback(engine.stop)
        urls = {group: engine.url for group, engine in engines.items()}
        coordinator = Coordinator(coordinator_config(plan, urls, (plan.model,)), keys)
        coordinator.live.plan = lambda: plan
        await stack.enter_async_context(coordinator.running(port=port))
        yield Service(plan, coordinator, engines)
