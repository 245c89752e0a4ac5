"""An open- or closed-loop client of ``/v1/completions`` that times every stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console

from hexgen2.loadgen.metrics import KvCounters, read_kv_counters
from hexgen2.loadgen.prompts import random_prompt
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Slo
from hexgen2.specs.results import KvTransfers, Results, Served
from hexgen2.specs.workload import Lengths, Workload

_REQUEST_LIMIT_S = 600.0  # a request that takes longer has failed: no load may hang for ever


@dataclass(frozen=True)
class Load:
    """What to send: Poisson arrivals at ``rate_rps``, or ``concurrency`` requests in flight."""

    url: str
    workload: Workload
    requests: int
    rate_rps: float | None = None
    concurrency: int | None = None
    seed: int = 0
    api_key: str | None = None
    slo: Slo = field(default_factory=Slo)


@dataclass(frozen=True)
class Endpoint:
    """What ``/v1/models`` says of the endpoint."""

    model: str
    max_model_len: int | None


@dataclass
class _Outcome:
    sent: float
    first: float | None = None
    end: float | None = None
    tokens: int = 0
    error: str | None = None


async def measure(load: Load, console: Console, ended: Callable[[], None] | None = None) -> dict[str, Any]:
    """Send the load, return the JSON of DESIGN section 9; raises InputError when nothing answers at the URL.
    ``ended`` is called when a request has ended."""
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    timeout = aiohttp.ClientTimeout(total=_REQUEST_LIMIT_S, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        endpoint = await _endpoint(session, load.url)
        rng = np.random.default_rng(load.seed)
        lengths = _cut_to(load.workload.sample(load.requests, rng), endpoint, console)
        gaps = (
            rng.exponential(1 / load.rate_rps, size=load.requests) if load.rate_rps else np.zeros(load.requests)
        )
        prompts_rng = np.random.default_rng(load.seed + 1)
        vocabulary = 2000  # every tokenizer in use has more ids than this
        before = await read_kv_counters(session, load.url)
        gate = asyncio.Semaphore(load.concurrency or load.requests)
        outcomes: list[_Outcome] = []
        done = 0

        async def one(place: int) -> None:
            nonlocal done
            prompt = random_prompt(int(lengths.inputs[place]), vocabulary, prompts_rng)
            body = {
                "model": endpoint.model,
                "prompt": prompt,
                "max_tokens": int(lengths.outputs[place]),
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            try:
                outcomes.append(await _request(session, load.url, body))
            finally:
                gate.release()
                done += 1
                if ended:
                    ended()
                if done % max(1, load.requests // 10) == 0:
                    console.print(f"{done} of {load.requests} requests done")

        start = time.perf_counter()
        due = start
        async with asyncio.TaskGroup() as tasks:
            for place in range(load.requests):
                due += gaps[place]
                await asyncio.sleep(max(0.0, due - time.perf_counter()) if load.rate_rps else 0.0)
                await gate.acquire()
                tasks.create_task(one(place))
        after = await read_kv_counters(session, load.url)
    for error in sorted({outcome.error for outcome in outcomes if outcome.error})[:5]:
        console.print(f"failed: {error}")
    return _results(outcomes, start, load, before, after).document()


async def _endpoint(session: aiohttp.ClientSession, url: str) -> Endpoint:
    try:
        async with session.get(f"{url}/v1/models") as response:
            if response.status == 401:
                raise InputError(url, "", "wants an API key", "give --api-key")
            entry = (await response.json())["data"][0]
            return Endpoint(str(entry["id"]), entry.get("max_model_len"))
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            url, "", f"is no OpenAI-compatible endpoint ({reason})", "start `hexgen2 serve` there"
        ) from None


def _cut_to(lengths: Lengths, endpoint: Endpoint, console: Console) -> Lengths:
    """Cut requests that the served model's context cannot hold, and say how many were cut."""
    limit = endpoint.max_model_len
    if limit is None:
        return lengths
    inputs = np.minimum(lengths.inputs, limit - 2)
    outputs = np.maximum(1, np.minimum(lengths.outputs, limit - 1 - inputs))
    cut = int(((inputs != lengths.inputs) | (outputs != lengths.outputs)).sum())
    if cut:
        console.print(f"{cut} of {len(lengths)} requests cut to the model's context of {limit} tokens")
    return Lengths(inputs, outputs)


async def _request(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> _Outcome:
    outcome = _Outcome(sent=time.perf_counter())
    finished = False
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return outcome
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                now = time.perf_counter()
                data = line[6:].strip()
                if data == b"[DONE]":
                    finished = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    outcome.error = f"stream error: {event['error']}"
                    return outcome
                if event.get("choices"):
                    outcome.first = outcome.first or now
                    outcome.end = now
                if event.get("usage"):
                    outcome.tokens = int(event["usage"]["completion_tokens"])
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    if not finished or outcome.first is None or outcome.tokens < 1:
        outcome.error = "the stream ended without an answer"
    return outcome


def _results(
    outcomes: list[_Outcome], start: float, load: Load, before: KvCounters | None, after: KvCounters | None
) -> Results:
    good = [outcome for outcome in outcomes if outcome.error is None]
    first = np.array([(outcome.first or 0.0) - outcome.sent for outcome in good])
    e2e = np.array([(outcome.end or 0.0) - outcome.sent for outcome in good])
    tokens = np.array([outcome.tokens for outcome in good], dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(tokens > 1, (e2e - first) / (tokens - 1), np.nan)
    ends = [outcome.end for outcome in good if outcome.end is not None]
    moved = KvTransfers()
    if before is not None and after is not None:
        count = after.transfers - before.transfers
        moved = KvTransfers(
            bytes=after.bytes - before.bytes,
            mean_s=(after.seconds - before.seconds) / count if count else None,
        )
    return Results(
        served=Served(first, tpot, e2e, tokens),
        failed=len(outcomes) - len(good),
        duration_s=max(ends) - start if ends else 0.0,
        slo=load.slo,
        kv_transfer=moved,
    )
