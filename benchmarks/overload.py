"""Ten times more requests than the engines can carry, for a minute: what becomes of them and of the service.

Two emulated decode engines behind one emulated prefill engine, a coordinator, and this process as an open-loop
client (Poisson arrivals). The exit code is 1 where a criterion is missed:

- nobody dies, and the coordinator's resident memory stays flat after the first third (within 5%);
- requests that are accepted keep their TPOT target (99% of them);
- 99% of their first tokens come within twice the time that one may wait in the queue;
- requests that are refused get 429 or 503 with Retry-After, 99% of them within 50 ms;
- within 5 s of the load's end requests are served as before.

    python benchmarks/overload.py --seconds 60 --times 10
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from processes import MODEL, config, coordinator, engine

from hexgen2.coordinator import Limits, RouteShare

TOKENS = 32
PROMPT_TOKENS = 4
STEP_BASE_S, STEP_PER_SEQUENCE_S = 0.02, 0.0005
TPOT_SLACK = 1.25  # the target over the engines' own step time at a full batch
REFUSED_WITHIN_S = 0.050
NORMAL_WITHIN_S = 5.0


@dataclass
class Seen:
    """What the client saw; times in seconds."""

    tpot: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    refused_after: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0
    broken: int = 0


async def ask(http: aiohttp.ClientSession, url: str, number: int, seen: Seen) -> bool:
    """One stream; whether it was served."""
    prompt = [number % 30_000, *range(1, PROMPT_TOKENS)]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "stream": True}
    began = time.perf_counter()
    try:
        async with http.post(url + "/v1/completions", json=body) as response:
            seen.statuses[str(response.status)] += 1
            if response.status != 200:
                await response.read()
                seen.refused_after.append(time.perf_counter() - began)
                seen.without_retry_after += "Retry-After" not in response.headers
                return False
            first, last, tail = 0.0, 0.0, b""
            async for data in response.content.iter_any():
                last = time.perf_counter()
                first = first or last
                tail = data
    except (aiohttp.ClientError, TimeoutError) as error:
        seen.statuses[type(error).__name__] += 1
        return False
    if not tail.endswith(b"data: [DONE]\n\n"):
        seen.broken += 1
        return False
    seen.ttft.append(first - began)
    seen.tpot.append((last - first) / (TOKENS - 1))
    return True


async def flood(
    http: aiohttp.ClientSession, url: str, rate: float, seconds: float, seen: Seen
) -> list[asyncio.Task[bool]]:
    """Requests at random times, `rate` a second, whatever becomes of them; those that still run at the end."""
    draw, tasks = random.Random(0), set[asyncio.Task[bool]]()
    began, at, number = time.perf_counter(), 0.0, 0
    while (at := at + draw.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        task = asyncio.create_task(ask(http, url, number, seen))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    return list(tasks)


async def recovery_s(http: aiohttp.ClientSession, url: str, normal_ttft_s: float) -> float:
    """Seconds until a request is served as before the load, and all later ones are too (10 s are watched)."""
    began, normal_since = time.perf_counter(), float("inf")
    while (sent := time.perf_counter()) - began < 10.0:
        probe = Seen()
        served = await ask(http, url, 0, probe)
        if not (served and probe.ttft[0] <= normal_ttft_s):
            normal_since = float("inf")
        elif normal_since == float("inf"):
            normal_since = sent - began
        await asyncio.sleep(0.1)
    return normal_since


async def memory(process: psutil.Process, into: list[int]) -> None:
    """Resident memory in bytes, four times a second."""
    while True:
        into.append(process.memory_info().rss)
        await asyncio.sleep(0.25)


def percentile(values: list[float], at: int) -> float | None:
    return statistics.quantiles(values, n=100, method="inclusive")[at - 1] if len(values) > 1 else None


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    batch = arguments.max_batch
    full_step_s = STEP_BASE_S + batch * STEP_PER_SEQUENCE_S
    capacity = 2 * batch / (TOKENS * full_step_s)  # requests/s of two decode engines
    steps = ("--step-base-s", str(STEP_BASE_S), "--step-per-sequence-s", str(STEP_PER_SEQUENCE_S))
    limits = Limits(queue_wait_s=arguments.queue_wait_s, capacity_factor=1.0)
    async with contextlib.AsyncExitStack() as stack:
        prompts = ("--prefill-base-s", "0", "--prefill-per-token-s", str(arguments.prompt_s / PROMPT_TOKENS))
        prefill = await stack.enter_async_context(engine("p0", 1.0, arguments.prefill_batch, *prompts))
        decode = [await stack.enter_async_context(engine(f"d{i}", 0.5, batch, *steps)) for i in range(2)]
        routes = [RouteShare(prefill="p0", decode=end.group_id, share=0.5) for end in decode]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, process = await stack.enter_async_context(
            coordinator(config([prefill, *decode], routes, limits), folder)
        )
        connector = aiohttp.TCPConnector(limit=0)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        calm, seen = Seen(), Seen()
        await asyncio.gather(*await flood(http, url, 0.5 * capacity, 5.0, calm))
        normal_ttft_s = 2.0 * max(calm.ttft) + 0.05
        resident: list[int] = []
        watch = asyncio.create_task(memory(process, resident))
        left = await flood(http, url, arguments.times * capacity, arguments.seconds, seen)
        back_s = await recovery_s(http, url, normal_ttft_s)
        await asyncio.gather(*left)
        watch.cancel()
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    third = len(resident) // 3
    target_s = TPOT_SLACK * full_step_s
    served = len(seen.tpot)
    refused = len(seen.refused_after)
    growth = max(resident[third:]) / max(resident[: third + 1]) - 1.0
    kept = sum(tpot <= target_s for tpot in seen.tpot) / max(1, served)
    quick = sum(after <= REFUSED_WITHIN_S for after in seen.refused_after) / max(1, refused)
    holds = {
        "alive": alive and not seen.broken and set(seen.statuses) <= {"200", "429", "503"},
        "memory_flat": growth <= 0.05,
        "tpot_kept": served > 0 and kept >= 0.99,
        "first_token_kept": (percentile(seen.ttft, 99) or 0.0) <= 2 * arguments.queue_wait_s,
        "refused_at_once": refused > 0 and quick >= 0.99 and not seen.without_retry_after,
        "back_to_normal": back_s <= NORMAL_WITHIN_S,
    }
    return {
        "settings": vars(arguments) | {"capacity_rps": round(capacity, 1)},
        "sent": sum(seen.statuses.values()),
        "statuses": dict(seen.statuses),
        "served_rps": round(served / arguments.seconds, 1),
        "tpot_ms": {at: _ms(percentile(seen.tpot, at)) for at in (50, 99)} | {"target": _ms(target_s)},
        "tpot_kept": round(kept, 4),
        "ttft_ms": {at: _ms(percentile(seen.ttft, at)) for at in (50, 99)},
        "refused_after_ms": {at: _ms(percentile(seen.refused_after, at)) for at in (50, 99)}
        | {"max": _ms(max(seen.refused_after, default=None))},
        "refused_within_50_ms": round(quick, 4),
        "resident_mib": {
            "first": _mib(resident[0]),
            "third": _mib(resident[third]),
            "max": _mib(max(resident)),
        },
        "back_to_normal_s": round(back_s, 2) if back_s < 1e9 else None,
        "holds": holds,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 1)


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=10.0, help="the load over what the engines can carry")
    parser.add_argument("--max-batch", type=int, default=16, help="of each decode engine")
    parser.add_argument("--prefill-batch", type=int, default=512, help="of the prefill engine")
    parser.add_argument("--prompt-s", type=float, default=0.005, help="that a prompt takes it, in seconds")
    parser.add_argument("--queue-wait-s", type=float, default=2.0, help="the coordinator's limit")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    report = asyncio.run(run(arguments))
    text = json.dumps(report, indent=2, default=str)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return 0 if all(report["holds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
