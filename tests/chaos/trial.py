"""One trial: a load, outages under it, and the verdict."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hexgen2.coordinator import CoordinatorConfig
from tests.chaos.faults import FaultRates, outages
from tests.chaos.fleet import Engine, Tormentor, door
from tests.chaos.load import Answer, Request, Wrong, ask_all

WHOLE_S = 240.0
"""A fleet that is not whole again by then never will be: real engines take their time to start."""
ROUNDS = 10


async def undisturbed(url: str, wanted: Sequence[Request], concurrency: int) -> dict[int, Answer]:
    """What one engine answers that nobody hurts, asked without a coordinator."""
    answers = await ask_all(url, wanted, concurrency)
    right = {number: answer for number, answer in answers.items() if isinstance(answer, Answer)}
    assert len(right) == len(wanted), [answer for answer in answers.values() if isinstance(answer, Wrong)][:3]
    return right


async def survive(
    folder: Path,
    config: CoordinatorConfig,
    engines: Mapping[str, Engine],
    wanted: Sequence[Request],
    right: Mapping[int, Answer],
    seed: int,
    concurrency: int,
    rates: FaultRates,
    workers: int = 1,
) -> None:
    """Every request ends with its right answer while engines fall; afterwards the fleet is whole and idle. On a
    quick machine they are asked again until engines of both kinds of outage have fallen under them.

    The counts go to standard output and to `report.json` in the folder.
    """
    async with door(config, folder, workers) as front:
        await front.wait_whole(WHOLE_S)
        roles = {engine.group_id: engine.role for engine in config.engines}
        began = time.monotonic()
        async with Tormentor(engines, outages(seed, roles, rates)) as tormentor:
            for _ in range(ROUNDS):
                answers = await ask_all(front.url, wanted, concurrency)
                metrics = await front.metrics()
                met = metrics["hexgen2:retries_total"] + metrics["hexgen2:migrations_total"]
                if answers != right or (len(tormentor.done) == 2 and met):
                    break
            took_s = time.monotonic() - began
        await front.wait_whole(WHOLE_S)
        health, metrics = await front.health(), await front.metrics()
    report = {
        "seed": seed,
        "engines": len(engines),
        "workers": workers,
        "requests": len(wanted),
        "seconds": round(took_s, 1),
        "kills": tormentor.done["kill"],
        "freezes": tormentor.done["freeze"],
        "retries": int(metrics["hexgen2:retries_total"]),
        "migrations": int(metrics["hexgen2:migrations_total"]),
        "wrong": sum(answers[number] != right[number] for number in right),
    }
    print(json.dumps(report))
    (folder / "report.json").write_text(json.dumps(report))
    bad = [(one.body, answers[one.number]) for one in wanted if answers[one.number] != right[one.number]]
    assert not bad, f"{len(bad)} wrong answers: {bad}"
    assert set(answers) == set(right)
    assert health["paths_up"] == health["paths"]
    assert all(engine["in_flight"] == 0 for engine in health["engines"].values())
    assert metrics["hexgen2:requests_in_flight"] == 0
    assert report["kills"] > 0
    assert report["freezes"] > 0
    assert report["retries"] + report["migrations"] > 0
