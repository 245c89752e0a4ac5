"""Engines are killed and frozen under load: every request ends with its full and right answer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hexgen2.emulator import EmulatedEngine, EmulatorConfig, LinearTiming
from tests.chaos.faults import FaultRates, outages
from tests.chaos.fleet import MODEL, Tormentor, door, emulated
from tests.chaos.load import Request, Wrong, ask_all, requests

STOPS = ("77", " t5", "001")


async def undisturbed(wanted: list[Request]) -> dict[int, object]:
    """What one engine answers that nobody hurts, without any coordinator."""
    config = EmulatorConfig(model_names=(MODEL,), timing=LinearTiming(0.0, step_base_s=0.0), max_model_len=4096)
    async with EmulatedEngine(config).running() as engine:
        answers = await ask_all(engine.url, wanted, concurrency=8)
    assert not any(isinstance(answer, Wrong) for answer in answers.values())
    return dict(answers)


async def survive(
    folder: Path, seed: int, size: tuple[int, int, int], count: int, concurrency: int, rates: FaultRates
) -> None:
    wanted = requests(seed, count, MODEL, STOPS)
    right = await undisturbed(wanted)
    async with emulated(*size, step_s=0.02) as (config, engines), door(config, folder) as front:
        await front.wait_whole(60)
        roles = {engine.group_id: engine.role for engine in config.engines}
        began = time.monotonic()
        async with Tormentor(engines, outages(seed, roles, rates)) as tormentor:
            answers = await ask_all(front.url, wanted, concurrency)
        took_s = time.monotonic() - began
        await front.wait_whole(30)
        health, metrics = await front.health(), await front.metrics()
    report = {
        "seed": seed,
        "engines": len(engines),
        "requests": count,
        "seconds": round(took_s, 1),
        "kills": tormentor.done["kill"],
        "freezes": tormentor.done["freeze"],
        "retries": int(metrics["hexgen2:retries_total"]),
        "migrations": int(metrics["hexgen2:migrations_total"]),
        "streams_broken_off": int(metrics.get("hexgen2:streams_broken_off_total", 0)),
        "wrong": sum(answers[number] != right[number] for number in right),
    }
    print(json.dumps(report))
    (folder / "report.json").write_text(json.dumps(report))
    bad = [(w.path, w.body, answers[w.number]) for w in wanted if answers[w.number] != right[w.number]]
    assert not bad, f"{len(bad)} of {count} answers: {bad}"
    assert set(answers) == set(right)
    assert health["paths_up"] == health["paths"]
    assert all(engine["in_flight"] == 0 for engine in health["engines"].values())
    assert metrics["hexgen2:requests_in_flight"] == 0
    assert report["kills"] > 0
    assert report["freezes"] > 0
    assert report["retries"] + report["migrations"] > 0


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_dozen_engines(tmp_path: Path, seed: int) -> None:
    await survive(tmp_path, seed, (3, 6, 3), 100, 16, FaultRates())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10, 14))
async def test_fifty_engines(tmp_path: Path, seed: int) -> None:
    await survive(tmp_path, seed, (15, 25, 10), 500, 40, FaultRates((0.05, 0.2), (0.5, 3.0), (0.3, 5.0)))
