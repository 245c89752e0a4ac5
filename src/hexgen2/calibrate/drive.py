"""Drive a live engine through prompts and decode batches of known sizes, and time it from outside.

Any OpenAI-compatible vLLM will do. Prompts are random token ids, so that no prefix cache helps; a batch is so
many requests at once. Times are those of a client: HTTP is in them, as it is for a user.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from hexgen2.calibrate.fit import Measured, Phase
from hexgen2.cost import Layout
from hexgen2.specs.errors import InputError
from hexgen2.specs.model import Model

REQUEST_LIMIT_S = 600.0
STEPS = 24
"""Decode steps that are timed at each point."""

PROMPT_TOKENS = (32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PROMPT_BATCHES = ((4, 128), (8, 128), (4, 512), (4, 2048))
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
DECODE_CONTEXTS = (64, 512, 1024, 2048, 4096, 8192)

Tell = Callable[[str], None]
Point = tuple[Phase, int, int]
"""Phase, batch, tokens of each prompt or context."""


@dataclass(frozen=True)
class Engine:
    """A live engine: where it is, what runs there on what."""

    url: str
    model: Model
    layout: Layout
    api_key: str | None = None


@dataclass(frozen=True)
class Grid:
    """How far to go: the longest sequence, the tokens of all sequences of a batch, the sequences of a batch,
    and how often each point is repeated."""

    longest: int = 16_384
    tokens: int = 65_536
    batch: int = 128
    repeats: int = 3

    def points(self) -> list[Point]:
        """All of them, within the limits."""
        prefill: list[Point] = [("prefill", 1, tokens) for tokens in PROMPT_TOKENS]
        prefill += [("prefill", batch, tokens) for batch, tokens in PROMPT_BATCHES]
        decode: list[Point] = [
            ("decode", batch, tokens) for batch in DECODE_BATCHES for tokens in DECODE_CONTEXTS
        ]
        return [
            point
            for point in (*prefill, *decode)
            if point[1] <= self.batch
            and point[2] + answer_tokens(point[1]) <= self.longest
            and point[1] * (point[2] + answer_tokens(point[1])) <= self.tokens
        ]


def answer_tokens(batch: int) -> int:
    """Tokens of each answer of a decode point: so many that the first still runs when the last begins, some
    steps later, and `STEPS` steps from then on."""
    return STEPS + 3 + batch


@dataclass(frozen=True)
class Timeline:
    """When tokens came: (seconds since the request was sent, index of the sequence), in order."""

    tokens: Sequence[tuple[float, int]]

    def all_begun_s(self, batch: int) -> float:
        """When each of ``batch`` sequences had its first token."""
        seen: set[int] = set()
        for at, index in self.tokens:
            seen.add(index)
            if len(seen) == batch:
                return at
        raise ValueError(f"only {len(seen)} of {batch} sequences began")

    def step_s(self, batch: int) -> float:
        """Seconds of a step, from the tokens that came while all sequences ran: after the second token of the
        last to begin, until the last token of the first to end.

        Of each sequence the time between two of its own arrivals counts, so that it does not matter how many
        tokens come at once. ValueError where the sequences did not run together.
        """
        counts = [0] * batch
        last = [0.0] * batch
        start: float | None = None
        for at, index in self.tokens:
            counts[index] += 1
            last[index] = at
            if start is None and min(counts) >= 2:
                start = at
        if start is None:
            raise ValueError("the sequences did not run together")
        end = min(last)
        seconds, steps = 0.0, 0
        for index in range(batch):
            within = [at for at, each in self.tokens if each == index and start <= at <= end]
            if within:
                seconds += within[-1] - within[0]
                steps += sum(at > within[0] for at in within)
        if not steps:
            raise ValueError("the sequences did not run together")
        return seconds / steps


async def measure(engine: Engine, grid: Grid, tell: Tell = lambda _: None, seed: int = 0) -> list[Measured]:
    """Time every point of the grid that the engine can hold; InputError where nothing answers at its URL.

    A point is the median of its repeats; one that the engine refuses is left out, and told of. The whole grid
    is gone through once for each repeat, so that a machine that is slow for some seconds does not decide a
    point. With each repeat the prompts are a token shorter: some engines keep what they prepared for a length
    (vLLM on a CPU the kernels of 128 sizes), and prompts of real traffic are seldom as long as one before.
    """
    headers = {"Authorization": f"Bearer {engine.api_key}"} if engine.api_key else {}
    timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S, sock_connect=10)
    rng = np.random.default_rng(seed)
    async with aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        name, longest = await served(session, engine.url)
        if longest is not None:
            grid = Grid(min(grid.longest, longest), grid.tokens, grid.batch, grid.repeats)
        points = grid.points()
        await _ask(session, engine, name, 1, 32, 8, rng)  # the first request of an engine is slow
        times: dict[Point, list[tuple[float, int]]] = {point: [] for point in points}
        for repeat in range(grid.repeats):
            for point in list(times):
                phase, batch, tokens = point
                length = max(1, tokens - repeat)
                try:
                    seconds = await _time(session, engine, name, phase, batch, length, rng)
                except ValueError as error:
                    tell(f"{_words(point)} left out: {error}")
                    del times[point]
                    continue
                times[point].append((seconds, length))
                place, every = sum(map(len, times.values())), grid.repeats * len(times)
                tell(f"[{place}/{every}] {_words(point)}: {seconds * 1e3:.4g} ms")
    found: list[Measured] = []
    for point, repeats in times.items():
        phase, batch, _ = point
        seconds, length = sorted(repeats)[len(repeats) // 2]
        context = length if phase == "prefill" else length + 2 + (STEPS + batch) / 2
        found.append(Measured(engine.model, phase, engine.layout, batch, context, seconds))
    return found


def _words(point: Point) -> str:
    phase, batch, tokens = point
    return f"{phase} of {batch} x {tokens} tokens"


async def _time(
    session: aiohttp.ClientSession,
    engine: Engine,
    name: str,
    phase: Phase,
    batch: int,
    tokens: int,
    rng: np.random.Generator,
) -> float:
    if phase == "prefill":
        return (await _ask(session, engine, name, batch, tokens, 1, rng)).all_begun_s(batch)
    return (await _ask(session, engine, name, batch, tokens, answer_tokens(batch), rng)).step_s(batch)


async def _ask(
    session: aiohttp.ClientSession,
    engine: Engine,
    name: str,
    batch: int,
    tokens: int,
    answer: int,
    rng: np.random.Generator,
) -> Timeline:
    """``batch`` streamed requests at once; ValueError where the engine refuses or fails one."""
    ids = rng.integers(10, min(engine.model.vocab_size, 30_000), size=(batch, tokens))
    came: list[tuple[float, int]] = []
    sent = time.perf_counter()

    async def one(index: int) -> None:
        body = {
            "model": name,
            "prompt": ids[index].tolist(),
            "max_tokens": answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,  # a chunk may carry several tokens
        }
        async with session.post(f"{engine.url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                at = time.perf_counter() - sent
                if line.startswith(b"data: ") and line[6:].strip() != b"[DONE]":
                    came.extend([(at, index)] * _tokens(json.loads(line[6:])))

    answers = await asyncio.gather(*map(one, range(batch)), return_exceptions=True)
    for error in answers:
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if error is not None:
            raise error
    return Timeline(came)


def _tokens(event: dict[str, Any]) -> int:
    """How many tokens an event brings; ValueError for an error event."""
    if "error" in event:
        raise ValueError(f"stream error: {event['error']}")
    count = 0
    for choice in event.get("choices") or ():
        tokens = choice.get("token_ids")
        count += len(tokens) if tokens is not None else int(bool(choice.get("text")))
    return count


async def served(session: aiohttp.ClientSession, url: str) -> tuple[str, int | None]:
    """(name of the served model, its longest sequence)."""
    try:
        async with session.get(f"{url}/v1/models") as response:
            if response.status == 401:
                raise InputError(url, "", "wants an API key", "give --api-key")
            entry = (await response.json())["data"][0]
            return str(entry["id"]), entry.get("max_model_len")
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, IndexError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            url, "", f"is no OpenAI-compatible endpoint ({reason})", "start the engine there"
        ) from None
