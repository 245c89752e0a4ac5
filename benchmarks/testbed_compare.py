"""One plan, served for real and simulated: the same requests at the same times. And floods, for throughput."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from testbed_fleet import coordinator

from hexgen2.coordinator import CoordinatorConfig
from hexgen2.cost import CostModel
from hexgen2.loadgen.client import Load, measure
from hexgen2.simulator import Requests, simulate
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.plan import Plan

LEAST_REQUESTS = 20
IN_FLIGHT = 64
"""Requests in flight in a flood: more than the devices need to be busy."""

WATCHED = 96
"""Requests by whose ends a flood's throughput is known."""


@dataclass(frozen=True)
class Figure:
    """One that is compared: its key and part in the results, and the error that is aimed at."""

    name: str
    key: str
    part: str | None
    aim: float

    def of(self, results: dict[str, Any]) -> float:
        return float(results[self.key] if self.part is None else results[self.key][self.part])


FIGURES = (
    Figure("throughput, requests/s", "throughput_rps", None, 0.10),
    Figure("TTFT P50, s", "ttft_s", "p50", 0.15),
    Figure("TTFT P99, s", "ttft_s", "p99", 0.30),
    Figure("TPOT P50, s", "tpot_s", "p50", 0.15),
    Figure("TPOT P99, s", "tpot_s", "p99", 0.30),
)


@dataclass(frozen=True)
class Drawn:
    """The requests that the client sends for a load, and the pause before the first of them, in seconds."""

    requests: Requests
    pause_s: float


def drawn(load: Load) -> Drawn:
    """What `hexgen2.loadgen` draws for a load of a given rate: lengths, then exponential gaps."""
    assert load.rate_rps is not None
    rng = np.random.default_rng(load.seed)
    lengths = load.workload.sample(load.requests, rng)
    arrivals = np.cumsum(rng.exponential(1 / load.rate_rps, size=load.requests))
    return Drawn(Requests(arrivals - arrivals[0], lengths.inputs, lengths.outputs), float(arrivals[0]))


async def compare(
    plan: Plan,
    cost: CostModel,
    config: CoordinatorConfig,
    level: float,
    seconds: float,
    runs: int,
    folder: Path,
) -> dict[str, Any]:
    """Measured and simulated figures at a part of the planned throughput, for so many seconds of arrivals, by
    so many runs with the same requests at the same times. What is measured is the mean of the runs, and how far
    they are apart is the least error that a simulation can be expected to have."""
    rate = level * plan.throughput_rps
    count = max(LEAST_REQUESTS, round(rate * seconds))
    workload = load_workload(plan.workload)
    measured = []
    for _ in range(runs):
        async with coordinator(config, folder) as url:
            load = Load(url, workload, count, rate_rps=rate, seed=round(100 * level))
            found = await measure(load, Console(quiet=True))
        sent = drawn(load)
        found["throughput_rps"] = found["completed"] / (found["duration_s"] - sent.pause_s)
        measured.append(found)
    simulated = simulate(plan, cost, sent.requests).document()
    return {
        "level": level,
        "rate_rps": rate,
        "requests": count,
        "failed": sum(found["failed"] for found in measured),
        "rows": [_row(figure, measured, simulated) for figure in FIGURES],
        "measured": measured,
        "simulated": simulated,
    }


def _row(figure: Figure, measured: list[dict[str, Any]], simulated: dict[str, Any]) -> dict[str, Any]:
    """One figure of a load. ``apart``: largest to smallest of the runs, less one."""
    values = [figure.of(found) for found in measured]
    mean = sum(values) / len(values)
    return {
        "figure": figure.name,
        "measured": mean,
        "apart": max(values) / min(values) - 1,
        "simulated": figure.of(simulated),
        "error": figure.of(simulated) / mean - 1,
        "aim": figure.aim,
    }


async def flood(config: CoordinatorConfig, workload: str, watched: int, folder: Path) -> dict[str, Any]:
    """What becomes of requests of which `IN_FLIGHT` are always in flight. ``throughput_rps``: by the ends of
    ``watched`` of them, after as many as are in flight have ended and before the last of them are sent, so that
    neither the beginning nor the end of the flood is in it."""
    count = watched + 2 * IN_FLIGHT
    ends: list[float] = []
    async with coordinator(config, folder) as url:
        load = Load(url, load_workload(workload), count, concurrency=IN_FLIGHT, seed=1)
        found = await measure(load, Console(quiet=True), lambda: ends.append(time.monotonic()))
    if found["failed"]:  # what is refused at once would count as served at once
        raise RuntimeError(f"{found['failed']} of {count} requests of a flood failed: it measures nothing")
    found["throughput_rps"] = watched / (ends[IN_FLIGHT + watched - 1] - ends[IN_FLIGHT - 1])
    return found
