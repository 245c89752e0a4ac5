"""Real vLLM engines are killed and frozen under load: every request ends with its full and right answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen2.coordinator import CoordinatorConfig
from hexgen2.deploy import (
    Deployment,
    EngineOptions,
    LocalLauncher,
    ProcessSpec,
    compile_plan,
    free_ports,
    guard,
)
from hexgen2.specs.catalog import load_model
from tests.chaos.faults import FaultRates
from tests.chaos.fleet import LIMITS, TIMEOUTS, Engine
from tests.chaos.load import requests
from tests.chaos.trial import survive, undisturbed
from tests.deploy.builders import cluster, group, plan

pytestmark = pytest.mark.engine

MODEL, LAYERS = "tiny-llama", 8
STOPS = ("the", ".", "er")
# An engine is back some 15 s after its start on a quiet machine of two cores.
RATES = FaultRates((2.0, 5.0), (0.5, 2.0), (1.0, 6.0), restart_s=40.0)


class RealEngine:
    """One serving group of one process tree, under a launcher of its own so that it can be started again."""

    def __init__(self, spec: ProcessSpec, config: CoordinatorConfig, folder: Path) -> None:
        self._deployment = Deployment(processes=(spec,), coordinator=config)
        self._launcher = LocalLauncher(folder / spec.name, grace_s=1.0)

    def pids(self) -> list[int]:
        return [pid for root in self._launcher.pids().values() for pid in guard.descendants(root)]

    async def start(self) -> None:
        await self.stop()
        await self._launcher.start(self._deployment)

    async def ready(self) -> None:
        await self._launcher.wait_ready(400)

    async def stop(self) -> None:
        await self._launcher.stop()


async def trial(folder: Path, seed: int, count: int, concurrency: int) -> None:
    """Two prefill and two decode engines with a route between each pair."""
    devices = cluster(*((name, "cpu-1c", 1) for name in "abcd"))
    groups = [
        group("p0", "prefill", (["a/0"], LAYERS), share=0.5),
        group("p1", "prefill", (["b/0"], LAYERS), share=0.5),
        group("d0", "decode", (["c/0"], LAYERS), share=0.5),
        group("d1", "decode", (["d/0"], LAYERS), share=0.5),
    ]
    routes = [(p, d, 0.25) for p in ("p0", "p1") for d in ("d0", "d1")]
    compiled = compile_plan(
        plan(devices, groups, *routes, model=MODEL), load_model(MODEL), free_ports(), EngineOptions()
    )
    # There may be moments without a whole path: two of these four may be out, and a start takes its time.
    limits = LIMITS.model_copy(update={"engine_wait_s": 90.0})
    config = compiled.coordinator.model_copy(update={"timeouts": TIMEOUTS, "limits": limits})
    engines = {spec.group_id: RealEngine(spec, config, folder) for spec in compiled.processes}
    hurt: dict[str, Engine] = dict(engines)
    wanted = requests(seed, count, MODEL, STOPS)
    try:
        for engine in engines.values():
            await engine.start()
        for engine in engines.values():
            await engine.ready()
        right = await undisturbed(config.engine("p0").url, wanted, concurrency)
        await survive(folder, config, hurt, wanted, right, seed, concurrency, RATES)
    finally:
        for engine in engines.values():
            await engine.stop()


async def test_four_engines(tmp_path: Path) -> None:
    await trial(tmp_path, seed=1, count=120, concurrency=8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3])
async def test_five_hundred_requests(tmp_path: Path, seed: int) -> None:
    await trial(tmp_path, seed, count=500, concurrency=8)
