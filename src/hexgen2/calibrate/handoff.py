"""What handing a KV cache over costs the two engines: the time that their other work loses.

An engine is kept busy with work of a steady pace: a prefill engine with prompts, a decode engine with the
answers of some sequences. Then KV caches are handed over one after another. What the work loses meanwhile is
what an engine spends on them, copying and notifying; what a request waits beyond the link's time and the steps
that it has to wait for costs nobody else anything, and is counted apart. The two legs are asked for as the
coordinator asks for them.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from hexgen2.calibrate.drive import REQUEST_LIMIT_S, Engine, served
from hexgen2.cost import Layout
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

CACHES = 8
"""KV caches that are handed over one after another while the work's pace is watched."""

SEQUENCES = 4
"""Sequences that a decode engine is kept busy with."""

LONGEST = 16_384
"""Tokens of a sequence that keeps a decode engine busy, at most."""

SHORT = 128
"""Tokens of the prompts that a prefill engine is kept busy with."""

PACE = 40
"""Steps or prompts, before and after the hand-overs, by which the pace of the work alone is known."""

IN_FLIGHT = 4
"""Prompts in flight to a prefill engine, so that some always wait for it."""


@dataclass(frozen=True)
class Handed:
    """What handing over the KV cache of a prompt of ``tokens`` tokens cost an engine, in seconds, by repeat.

    ``lost_s``: what its other work lost by it. ``wait_s``: what the request waited beyond the steps under way,
    its own and the link (nothing for the engine that sends).
    """

    layout: Layout
    tokens: int
    lost_s: tuple[float, ...]
    wait_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Handoffs:
    """What hand-overs cost the engine that sends and the one that takes over."""

    sent: tuple[Handed, ...]
    received: tuple[Handed, ...]


@dataclass(frozen=True)
class _Round:
    """`CACHES` hand-overs beside steady work of both engines: what each of them took from the work of the one
    that sends and the one that takes over, a step of the latter alone, and the first token of a second leg (the
    mean)."""

    sent_s: float
    received_s: float
    step_s: float
    first_token_s: float


async def measure_handoffs(
    source: Engine, target: Engine, link: Link | None, prompts: Sequence[int], repeats: int = 3, seed: int = 0
) -> Handoffs:
    """What handing over the KV caches of prompts of so many tokens over ``link`` costs both engines, and what
    the request waits. Without a known link its time counts as waiting. InputError where an engine refuses or
    fails a leg."""
    rounds: list[tuple[int, list[_Round]]] = [(tokens, []) for tokens in prompts]
    async with _client(target, seed) as client:
        met = await client.prefilled(source.url, prompts[0])
        await client.first_token_s(target.url, source.url, met)  # the engines meet
        for _ in range(repeats):  # all lengths once for each, so that a slow phase does not decide one
            for tokens, found in rounds:
                found.append(await _round(client, source.url, target.url, tokens))
    sent, received = [], []
    for tokens, found in rounds:
        sent.append(Handed(source.layout, tokens, tuple(one.sent_s for one in found)))
        link_s = 0.0 if link is None else link.seconds(tokens * target.model.kv_bytes_per_token)
        # It asks at the end of a step and joins at the end of another, each half a step later in the mean; its
        # own step is longer by what the engine loses.
        waits = tuple(max(0.0, one.first_token_s - link_s - 2 * one.step_s - one.received_s) for one in found)
        received.append(Handed(target.layout, tokens, tuple(one.received_s for one in found), waits))
    return Handoffs(tuple(sent), tuple(received))


async def _round(client: _Client, source_url: str, target_url: str, tokens: int) -> _Round:
    """Hand over `CACHES` caches one after another while both engines work, and see what the work loses."""
    held = [await client.prefilled(source_url, tokens) for _ in range(CACHES)]
    async with _prompts(client, source_url) as sending, _answers(client, target_url) as receiving:
        works = (sending, receiving)
        marks = [await _marks(works, 2), await _marks(works, PACE)]
        firsts = [await client.first_token_s(target_url, source_url, body) for body in held]
        marks += [await _marks(works, 1), await _marks(works, PACE)]
    sent, received = (_lost(*seen) for seen in zip(*marks, strict=True))
    return _Round(sent.seconds / CACHES, received.seconds / CACHES, received.unit_s, sum(firsts) / CACHES)


async def _marks(works: Iterable[_Work], units: int) -> list[_Mark]:
    """Where each engine's work is when it has done so many units more."""
    await asyncio.gather(*(work.more(units) for work in works))
    return [work.last for work in works]


@dataclass(frozen=True)
class _Lost:
    """Seconds that work took in place of what it takes alone, and of a unit of it alone."""

    seconds: float
    unit_s: float


def _lost(first: _Mark, before: _Mark, after: _Mark, last: _Mark) -> _Lost:
    """What work lost between ``before`` and ``after``. Its pace alone is that of the time before and the time
    behind: contexts grow meanwhile, evenly."""
    alone_s = before.at - first.at + last.at - after.at
    unit_s = alone_s / (before.units - first.units + last.units - after.units)
    return _Lost(after.at - before.at - (after.units - before.units) * unit_s, unit_s)


@dataclass(frozen=True)
class _Mark:
    """Units of work that are done, and when the last of them was."""

    units: int
    at: float


class _Work:
    """Steady work of an engine, in units: steps, prompts."""

    def __init__(self) -> None:
        self.last = _Mark(0, time.perf_counter())
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    def done(self, units: int = 1) -> None:
        self.last = _Mark(self.last.units + units, time.perf_counter())
        self._changed.set()

    async def more(self, units: int) -> None:
        """Wait until so many units more are done; InputError where the work has ended before."""
        needed = self.last.units + units
        while self.last.units < needed:
            self._changed.clear()
            for task in self._tasks:
                if task.done():
                    task.result()
                    mend = "give an engine that takes longer sequences"
                    raise InputError("calibration", "", "an engine's work ended while it was watched", mend)
            await self._changed.wait()

    @asynccontextmanager
    async def running(self, works: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[_Work]:
        self._tasks = [asyncio.create_task(work) for work in works]
        for task in self._tasks:
            task.add_done_callback(lambda _: self._changed.set())
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


def _prompts(client: _Client, url: str) -> AbstractAsyncContextManager[_Work]:
    """Keep a prefill engine busy with prompts that nobody fetches; a unit is a prompt."""
    work = _Work()

    async def go() -> None:
        while True:
            await client.whole(url, client.body(SHORT, 1))
            work.done()

    return work.running(go() for _ in range(IN_FLIGHT))


def _answers(client: _Client, url: str) -> AbstractAsyncContextManager[_Work]:
    """Keep a decode engine busy with some sequences; a unit is a step, once all of them have begun."""
    work = _Work()
    begun: set[int] = set()

    async def go(number: int) -> None:
        def came(tokens: int) -> None:
            begun.add(number)
            if number == 0 and len(begun) == SEQUENCES:
                work.done(tokens)

        body = client.body(SHORT, min(LONGEST, client.longest) - SHORT)
        await client.stream(url, body, came)

    return work.running(go(number) for number in range(SEQUENCES))


class _Client:
    """Asks both engines."""

    def __init__(
        self, session: aiohttp.ClientSession, name: str, longest: int, vocabulary: int, seed: int
    ) -> None:
        self.longest = longest
        self._session = session
        self._name = name
        self._vocabulary = min(vocabulary, 30_000)
        self._rng = np.random.default_rng(seed)

    def body(self, tokens: int, answer: int) -> dict[str, Any]:
        ids = self._rng.integers(10, self._vocabulary, size=tokens).tolist()
        return {"model": self._name, "prompt": ids, "max_tokens": answer, "temperature": 0, "ignore_eos": True}

    async def whole(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that is not streamed; InputError where the engine refuses it."""
        headers = {"X-Request-Id": uuid.uuid4().hex}
        async with self._session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            if response.status != 200:
                said = json.dumps(answer)[:200]
                raise InputError(url, "", f"refuses a prompt ({said})", "give an engine of that model")
            return answer

    async def stream(self, url: str, body: dict[str, Any], came: Callable[[int], None]) -> None:
        """Call ``came`` with the number of tokens of each event of an answer."""
        body = {**body, "stream": True, "return_token_ids": True}
        async with self._session.post(f"{url}/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: ") and line[6:].strip() != b"[DONE]":
                    event = json.loads(line[6:])
                    for choice in event.get("choices") or ():
                        came(len(choice.get("token_ids") or choice.get("text") or ""))

    async def prefilled(self, url: str, tokens: int) -> dict[str, Any]:
        """A request whose KV cache a prefill engine holds: the second leg's body."""
        body = self.body(tokens, 1)
        answer = await self.whole(url, {**body, "kv_transfer_params": FIRST_LEG})
        if not answer.get("kv_transfer_params"):
            problem = f"hands over no KV cache ({json.dumps(answer)[:200]})"
            raise InputError(url, "", problem, "give an engine with a KV connector, in the producer's role")
        return {**body, "kv_transfer_params": answer["kv_transfer_params"]}

    async def first_token_s(self, url: str, source: str, body: dict[str, Any]) -> float:
        """Seconds from a second leg to its only token; InputError where none comes."""
        begun: list[float] = []
        sent = time.perf_counter()
        await self.stream(url, body, lambda _: begun.append(time.perf_counter() - sent))
        if not begun:
            raise InputError(url, "", f"did not go on from the KV cache of {source}", "look into its log")
        return begun[0]


@asynccontextmanager
async def _client(engine: Engine, seed: int) -> AsyncIterator[_Client]:
    headers = {"Authorization": f"Bearer {engine.api_key}"} if engine.api_key else {}
    timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        name, longest = await served(session, engine.url)
        yield _Client(session, name, longest or LONGEST, engine.model.vocab_size, seed)
