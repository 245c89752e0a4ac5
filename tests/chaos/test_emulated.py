"""Emulated engines are killed and frozen under load: every request ends with its full and right answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen2.emulator import EmulatedEngine, EmulatorConfig, LinearTiming
from tests.chaos.faults import FaultRates
from tests.chaos.fleet import MODEL, emulated
from tests.chaos.load import requests
from tests.chaos.trial import survive, undisturbed

STOPS = ("77", " t5", "001")


async def trial(
    folder: Path,
    seed: int,
    size: tuple[int, int, int],
    count: int,
    concurrency: int,
    rates: FaultRates,
    workers: int,
) -> None:
    wanted = requests(seed, count, MODEL, STOPS, several=True)
    quick = EmulatorConfig(model_names=(MODEL,), timing=LinearTiming(0.0, step_base_s=0.0), max_model_len=4096)
    async with EmulatedEngine(quick).running() as engine:
        right = await undisturbed(engine.url, wanted, concurrency=8)
    async with emulated(*size, step_s=0.02) as (config, engines):
        await survive(folder, config, engines, wanted, right, seed, concurrency, rates, workers)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seed", "workers"), [(1, 1), (2, 2)])
async def test_a_dozen_engines(tmp_path: Path, seed: int, workers: int) -> None:
    await trial(tmp_path, seed, (3, 6, 3), 100, 16, FaultRates(), workers)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "workers"), [(10, 1), (11, 1), (12, 2), (13, 2)])
async def test_fifty_engines(tmp_path: Path, seed: int, workers: int) -> None:
    rates = FaultRates((0.05, 0.2), (0.5, 3.0), (0.3, 5.0))
    await trial(tmp_path, seed, (15, 25, 10), 500, 40, rates, workers)
