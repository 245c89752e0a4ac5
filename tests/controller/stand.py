"""A plan on emulated engines whose pace the cost model sets, a coordinator, a controller, and clients."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from hexgen2.controller.assess import BOTH, Assessment, Flipping, Task, assess
from hexgen2.controller.control import Controller, Mode, Watching
from hexgen2.controller.decide import Decision, Policy
from hexgen2.coordinator import Coordinator, Limits, Timeouts
from hexgen2.cost import CostModel, Efficiencies, Efficiency, Profile, Settings, shape
from hexgen2.deploy import EngineFailed, coordinator_config
from hexgen2.emulator import EmulatedEngine, EmulatorConfig
from hexgen2.emulator.timing import ModelledTiming
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.simulator.placement import placement
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.plan import Group, Plan
from hexgen2.specs.workload import Lengths
from tests.scheduler.support import SMALL
from tests.waiting import HUNG_S, until

MODEL = "small"


def slow_model(slowness: float, batch: int) -> CostModel:
    """GPUs that reach so little of their data sheet that a test on two cores can play a fleet of them."""
    small = 0.05 / slowness
    efficiency = Efficiency(
        compute=small,
        attention=small,
        memory=small * 3,
        kv=small * 3,
        link=0.5,
        layer_overhead_s=0,
        step_overhead_s=0,
    )
    kinds = ("A100-80G-PCIe", "L40")
    profile = Profile(
        name="slow", source="a test", date="2026-01-01", engine="none", gpus=dict.fromkeys(kinds, efficiency)
    )
    return CostModel(SMALL, Efficiencies([profile]), Settings(max_batch=batch))


class EmulatedGroups:
    """Runs a plan's groups as emulated engines in this process."""

    def __init__(self, cost: CostModel, start_s: float = 0.5) -> None:
        self.cost = cost
        self.start_s = start_s
        self.able: set[str] | None = None
        """The only groups that can be started, where that is not all."""
        self.engines: dict[str, EmulatedEngine] = {}
        self.started: list[str] = []
        self.ended: list[str] = []

    @property
    def urls(self) -> Mapping[str, str]:
        return {group: engine.url for group, engine in self.engines.items()}

    async def start(self, plan: Plan, groups: Sequence[str]) -> None:
        await asyncio.sleep(self.start_s)
        for name in groups:
            if self.able is not None and name not in self.able:
                raise EngineFailed(name, "does not start in this test", (), Path("/dev/null"))
        for name in groups:
            self.started.append(name)
            engine = EmulatedEngine(self._config(plan, plan.group_by_id[name]))
            await engine.start()
            self.engines[name] = engine

    async def end(self, groups: Sequence[str]) -> None:
        assert groups, "there is nothing to end"
        for name in groups:
            self.ended.append(name)
            await self.engines.pop(name).stop()

    async def revive(self, plan: Plan, name: str) -> None:
        """The engine of a group that died answers again, at its old address."""
        dead = self.engines[name]
        port = dead.port
        await dead.stop()
        engine = EmulatedEngine(self._config(plan, plan.group_by_id[name]))
        await engine.start(port)
        self.engines[name] = engine

    async def close(self) -> None:
        for engine in self.engines.values():
            await engine.stop()

    def _config(self, plan: Plan, group: Group) -> EmulatorConfig:
        compiled = self.cost.compiled(shape(plan.cluster, placement(plan, group)))
        return EmulatorConfig(
            model_names=(MODEL,),
            role=group.role,
            timing=ModelledTiming(compiled.costs),
            kv_tokens=compiled.max_tokens,
            token_budget=self.cost.settings.token_budget,
            max_batch=group.max_batch,
            kv_bytes_per_token=round(self.cost.model.kv_bytes_per_token),
        )


@dataclass
class Load:
    """Clients that each wait for an answer before they ask again. ``lengths`` may be changed under way."""

    url: str
    lengths: Lengths
    clients: int
    answered: deque[float] = field(default_factory=deque)
    lost: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0
    model: str = MODEL

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            numbers = itertools.count()
            tasks = [asyncio.create_task(self._client(http, numbers)) for _ in range(self.clients)]
            try:
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, http: aiohttp.ClientSession, numbers: Any) -> None:
        while True:
            number = next(numbers)
            place = number % len(self.lengths)
            prompt = np.random.default_rng(number).integers(1, 2_000, int(self.lengths.inputs[place]))
            tokens = int(self.lengths.outputs[place])
            body = {
                "model": self.model,
                "prompt": prompt.tolist(),
                "max_tokens": tokens,
                "ignore_eos": True,
            }
            try:
                async with http.post(self.url + "/v1/completions", json=body) as response:
                    answer = await response.json()
                    if response.status != 200 or answer["usage"]["completion_tokens"] != tokens:
                        self.lost.append(f"{response.status}: {answer}")
                        continue
            except aiohttp.ClientError as error:
                self.lost.append(repr(error))
                continue
            now = time.monotonic()
            if self.answered:
                self.longest_gap_s = max(self.longest_gap_s, now - self.answered[-1])
            self.answered.append(now)

    async def more(self, count: int = 20) -> None:
        """Wait for so many more answers."""
        answered = len(self.answered)
        await until(lambda: len(self.answered) >= answered + count)

    async def rate(self, seconds: float) -> float:
        """Requests/s answered in the next seconds."""
        before = len(self.answered)
        began = time.monotonic()
        await asyncio.sleep(seconds)
        return (len(self.answered) - before) / (time.monotonic() - began)


@dataclass
class Stand:
    coordinator: Coordinator
    groups: EmulatedGroups
    controller: Controller
    decisions: list[Decision]

    @property
    def actions(self) -> list[str]:
        return [decision.action for decision in self.decisions if decision.action != "keep"]


async def here(task: Task) -> Assessment:
    """The work in a thread of this process: a test's fleet is small."""
    return await asyncio.to_thread(assess, task)


@contextlib.asynccontextmanager
async def serving(
    plan: Plan,
    planned: Lengths,
    cost: CostModel,
    *,
    policy: Policy,
    watching: Watching,
    mode: Mode = "on",
    flips: bool = True,
    start_s: float = 0.5,
    **more: Any,
) -> AsyncIterator[Stand]:
    """The plan served, and a controller that watches it."""
    groups = EmulatedGroups(cost, start_s)
    await groups.start(plan, [group.id for group in plan.groups])
    config = coordinator_config(plan, groups.urls, (MODEL,)).model_copy(
        update={
            "timeouts": Timeouts(health_interval_s=0.2, health_timeout_s=HUNG_S, connect_s=HUNG_S),
            "limits": Limits(queue_wait_s=3600.0, max_retries=5),
        }
    )
    decisions: list[Decision] = []
    try:
        async with Coordinator(config).running() as coordinator:
            controller = Controller(
                plan,
                planned,
                cost,
                PROFILES["vllm"],
                coordinator,
                groups,
                mode=mode,
                policy=policy,
                watching=watching,
                flipping=lambda of: Flipping({group.id: BOTH for group in of.groups} if flips else {}),
                tell=decisions.append,
                work=more.pop("work", here),
                **more,
            )
            task = asyncio.create_task(controller.run())
            try:
                yield Stand(coordinator, groups, controller, decisions)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
    finally:
        await groups.close()


def planned(cluster: Cluster, lengths: Lengths, cost: CostModel, solver: str = "paper") -> Plan:
    return schedule(
        Problem(cluster, "a test", lengths, cost, PROFILES["vllm"], model_name=SMALL.name), solver=solver
    )
