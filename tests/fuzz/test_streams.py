"""Answers that are cut off, or torn into pieces, at any byte: another engine takes over and nothing shows."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import aiohttp
import pytest

from hexgen2.coordinator import Coordinator, CoordinatorConfig, EngineEndpoint, Limits
from hexgen2.emulator import EmulatedEngine, EmulatorConfig, LinearTiming
from tests.chaos.load import CHAT, COMPLETIONS, Answer, Request, Wrong, ask
from tests.coordinator.conftest import MODEL, QUICK

INSTANT = EmulatorConfig(model_names=(MODEL,), timing=LinearTiming(0.0, step_base_s=0.0002))


class Cutter:
    """A TCP relay before an engine. Answers to POST pass in pieces of random sizes; the next one ends after
    `cut_after` bytes (HTTP's own included), by a reset or by an orderly close.
    """

    def __init__(self, engine_port: int, seed: int) -> None:
        self._engine_port = engine_port
        self._draw = random.Random(seed)
        self.cut_after: int | None = None
        self.passed = 0  # bytes of the last answer
        self.cuts = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._engine_port)
        pumps: list[asyncio.Task[None]] = []
        generating = asyncio.Event()

        async def upwards() -> None:
            while data := await reader.read(65536):
                if data.startswith(b"POST /v1/"):
                    self.passed = 0
                    generating.set()
                up_writer.write(data)
                await up_writer.drain()

        async def downwards() -> None:
            while data := await up_reader.read(65536):
                while data:
                    size = self._draw.choice((1, 3, 40, 300, 5000)) if generating.is_set() else len(data)
                    if generating.is_set() and self.cut_after is not None:
                        if self.passed >= self.cut_after:
                            self.cut_after = None
                            self.cuts += 1
                            if self._draw.random() < 0.5:
                                writer.transport.abort()
                            return
                        size = min(size, self.cut_after - self.passed)
                    self.passed += len(data[:size])
                    writer.write(data[:size])
                    await writer.drain()
                    data = data[size:]

        with contextlib.suppress(ConnectionError):
            pumps = [asyncio.create_task(upwards()), asyncio.create_task(downwards())]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await pump
        for end in (writer, up_writer):
            end.close()


@contextlib.asynccontextmanager
async def cut_off(seed: int) -> AsyncIterator[tuple[str, Cutter, aiohttp.ClientSession]]:
    """A coordinator whose first engine, behind the cutter, gets all requests that it can take."""
    async with EmulatedEngine(INSTANT).running() as first, EmulatedEngine(INSTANT).running() as second:
        cutter = Cutter(first.port, seed)
        async with cutter.running() as port:
            config = CoordinatorConfig(
                served_model_names=(MODEL,),
                engines=(
                    EngineEndpoint(
                        group_id="cut", role="colocated", url=f"http://127.0.0.1:{port}", share=0.9999
                    ),
                    EngineEndpoint(group_id="well", role="colocated", url=second.url, share=0.0001),
                ),
                timeouts=QUICK,
                limits=Limits(breaker_failures=10**6),
            )
            async with Coordinator(config).running() as coordinator, aiohttp.ClientSession() as http:
                yield coordinator.url, cutter, http


REQUESTS = [
    Request(0, COMPLETIONS, {"prompt": "a b", "max_tokens": 9, "stream": True}),
    Request(1, COMPLETIONS, {"prompt": "a", "max_tokens": 9, "stream": True, "stop": ["9 t"], "logprobs": 1}),
    Request(2, COMPLETIONS, {"prompt": "a b", "max_tokens": 9}),
    Request(
        3,
        CHAT,
        {
            "messages": [{"role": "user", "content": "hello"}],
            "max_completion_tokens": 9,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=["stream", "stop", "plain", "chat"])
async def test_every_cut(request_: Request) -> None:
    async with cut_off(seed=request_.number) as (url, cutter, http):
        whole = await ask(http, url, request_)
        length = cutter.passed
        assert length > 500
        wrong: dict[int, Answer | Wrong] = {}
        for at in range(0, length, 13):
            cutter.cut_after = at
            try:
                answer: Answer | Wrong = await ask(http, url, request_)
            except Wrong as error:
                answer = error
            if answer != whole:
                wrong[at] = answer
        assert not wrong
        assert cutter.cuts > length / 13 * 0.9
