"""What it takes to go on from a KV cache that another engine has: the two legs of a request, timed.

A prefill engine computes a prompt; then the decode engine is asked for the answer, as the coordinator does it.
What is timed is the second leg until its first token, on idle engines: the link's part of it is known, a step's
too, and the rest is the engine's own.
"""

from __future__ import annotations

import json
import statistics
import time
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

from hexgen2.calibrate.drive import REQUEST_LIMIT_S, Engine, served
from hexgen2.calibrate.fit import Measured
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import Link

FIRST_LEG = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
PROMPTS = (64, 256, 1024)
"""Tokens of the prompts whose KV caches are handed over, unless others are given."""

ANSWER = 2
"""Tokens of the answer: the first is timed."""


async def measure_handoff(
    prefill_url: str,
    decode: Engine,
    link: Link | None,
    prompts: Sequence[int],
    repeats: int = 3,
    seed: int = 0,
) -> list[Measured]:
    """Time the hand-over of prompts of so many tokens over ``link`` to the engine ``decode``; the median of the
    repeats of each. Without a known link its time counts as the engine's. InputError where an engine refuses or
    fails a leg."""
    rng = np.random.default_rng(seed)
    found: list[Measured] = []
    headers = {"Authorization": f"Bearer {decode.api_key}"} if decode.api_key else {}
    timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        name, _ = await served(session, decode.url)
        await _second_leg_s(session, prefill_url, decode, name, prompts[0], rng)  # the engines meet
        for tokens in prompts:
            times = [
                await _second_leg_s(session, prefill_url, decode, name, tokens, rng) for _ in range(repeats)
            ]
            seconds = statistics.median(times)
            found.append(Measured(decode.model, "handoff", decode.layout, 1, tokens, seconds, link))
    return found


async def _second_leg_s(
    session: aiohttp.ClientSession,
    prefill_url: str,
    decode: Engine,
    name: str,
    tokens: int,
    rng: np.random.Generator,
) -> float:
    ids = rng.integers(10, min(decode.model.vocab_size, 30_000), size=tokens).tolist()
    body: dict[str, Any] = {"model": name, "prompt": ids, "temperature": 0, "ignore_eos": True}
    headers = {"X-Request-Id": uuid.uuid4().hex}
    first = {**body, "max_tokens": 1, "kv_transfer_params": FIRST_LEG}
    async with session.post(f"{prefill_url}/v1/completions", json=first, headers=headers) as response:
        answer = await response.json()
        if response.status != 200 or not answer.get("kv_transfer_params"):
            problem = f"hands over no KV cache ({json.dumps(answer)[:200]})"
            raise InputError(
                prefill_url, "", problem, "give an engine with a KV connector, in the producer's role"
            )
    second = {**body, "max_tokens": ANSWER, "stream": True, "kv_transfer_params": answer["kv_transfer_params"]}
    sent = time.perf_counter()
    begun: float | None = None
    async with session.post(f"{decode.url}/v1/completions", json=second, headers=headers) as response:
        async for line in response.content:
            if begun is None and line.startswith(b"data: ") and json.loads(line[6:]).get("choices"):
                begun = time.perf_counter() - sent
    if begun is None:
        problem = f"did not go on from the KV cache of {prefill_url}"
        raise InputError(decode.url, "", problem, "look into its log")
    return begun
