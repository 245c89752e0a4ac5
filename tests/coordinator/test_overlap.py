"""Both legs at once: the decode engine is sent its request while the prompt is still being computed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hexgen2.coordinator import Coordinator, CoordinatorConfig, EngineEndpoint, Limits, RouteShare
from tests.waiting import until

from .conftest import MODEL, QUICK

STREAM = {"version": 1, "engine": "p0", "lease_s": 30.0, "block_tokens": 16, "workers": []}
CHUNK = {
    "id": "x",
    "object": "text_completion",
    "choices": [{"index": 0, "text": "t", "finish_reason": "stop"}],
}


@dataclass
class Fake:
    """An engine that answers when it is told to. `kv` is what a leg of it carried; `cut` counts requests that
    ended without their answer.
    """

    role: str
    open: asyncio.Event = field(default_factory=asyncio.Event)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    cut: int = 0
    url: str = ""

    @property
    def kv(self) -> dict[str, Any]:
        kv: dict[str, Any] = self.bodies[-1]["kv_transfer_params"]
        return kv

    async def complete(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.bodies.append(body)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cut += 1
            raise
        status = self.statuses.pop() if self.statuses else 200
        if status != 200:
            return web.json_response({"error": {"message": "no", "type": "x", "code": status}}, status=status)
        if self.role == "decode" and body.get("stream"):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(http)
            await response.write(f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n".encode())
            return response
        answer = {**CHUNK, "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
        if self.role == "prefill":
            answer["kv_transfer_params"] = {"do_remote_prefill": True, "hexgen_stream": STREAM}
        return web.json_response(answer)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Fake]:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        for path in ("/health", "/v1/models", "/metrics"):
            app.router.add_get(path, _ok)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


async def _ok(_: web.Request) -> web.Response:
    return web.json_response({"data": []})


@dataclass
class Stand:
    prefill: Fake
    decode: Fake
    door: Coordinator
    http: aiohttp.ClientSession

    async def ask(self, stream: bool = False) -> tuple[int, str]:
        body = {"model": MODEL, "prompt": "a b c", "stream": stream}
        async with self.http.post(self.door.url + "/v1/completions", json=body) as response:
            return response.status, await response.text()


@contextlib.asynccontextmanager
async def stand(*, overlap: bool = True, batch: int = 8) -> AsyncIterator[Stand]:
    """A pair that has served one request, the one that teaches the coordinator how caches are streamed."""
    async with Fake("prefill").running() as prefill, Fake("decode").running() as decode:
        config = CoordinatorConfig(
            served_model_names=(MODEL,),
            engines=(
                EngineEndpoint(group_id="p0", role="prefill", url=prefill.url, share=1.0),
                EngineEndpoint(group_id="d0", role="decode", url=decode.url, share=1.0, max_batch=batch),
            ),
            routes=(RouteShare(prefill="p0", decode="d0", share=1.0),),
            timeouts=QUICK,
            limits=Limits(max_migrations=0),
            overlap_kv=overlap,
        )
        async with Coordinator(config).running() as door, aiohttp.ClientSession() as http:
            made = Stand(prefill, decode, door, http)
            prefill.open.set()
            decode.open.set()
            assert (await made.ask())[0] == 200
            assert decode.kv["hexgen_stream"] == STREAM  # opaque and whole, after leg 1
            prefill.open.clear()
            decode.open.clear()
            yield made


@pytest.mark.parametrize("stream", [False, True])
async def test_leg_two_is_sent_while_leg_one_is_under_way(stream: bool) -> None:
    async with stand() as made:
        asked = asyncio.create_task(made.ask(stream))
        await until(lambda: len(made.prefill.bodies) == len(made.decode.bodies) == 2)
        key = made.prefill.kv["hexgen_stream"]["key"]
        assert made.prefill.kv["do_remote_decode"] is True
        sent = made.decode.kv
        assert sent == {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "hexgen_stream": {**STREAM, "key": key},
        }
        made.prefill.open.set()
        await asyncio.sleep(0.05)
        assert not asked.done()
        made.decode.open.set()
        assert (await asked)[0] == 200
        await made.ask(stream)
        assert made.prefill.kv["hexgen_stream"]["key"] != key
    assert made.prefill.cut == made.decode.cut == 0


async def test_the_legs_go_in_turn_unless_asked_otherwise() -> None:
    async with stand(overlap=False) as made:
        asked = asyncio.create_task(made.ask())
        await until(lambda: len(made.prefill.bodies) == 2)
        await asyncio.sleep(0.05)
        assert len(made.decode.bodies) == 1
        assert "hexgen_stream" not in made.prefill.kv
        made.prefill.open.set()
        made.decode.open.set()
        assert (await asked)[0] == 200


async def test_the_legs_go_in_turn_where_the_decode_engine_has_no_place() -> None:
    async with stand(batch=1) as made:
        first = asyncio.create_task(made.ask())
        await until(lambda: len(made.prefill.bodies) == len(made.decode.bodies) == 2)
        second = asyncio.create_task(made.ask())
        await until(lambda: len(made.prefill.bodies) == 3)
        assert "hexgen_stream" not in made.prefill.kv
        made.prefill.open.set()
        made.decode.open.set()
        assert [(await first)[0], (await second)[0]] == [200, 200]


async def test_a_prompt_that_is_refused_ends_leg_two() -> None:
    async with stand() as made:
        made.prefill.statuses = [400]
        asked = asyncio.create_task(made.ask())
        await until(lambda: len(made.prefill.bodies) == len(made.decode.bodies) == 2)
        made.prefill.open.set()
        assert (await asked)[0] == 400
        await until(lambda: made.decode.cut == 1)


@pytest.mark.parametrize("failing", ["prefill", "decode"])
async def test_a_leg_that_fails_ends_the_other_and_both_are_tried_again(failing: str) -> None:
    async with stand() as made:
        bad, good = (made.prefill, made.decode) if failing == "prefill" else (made.decode, made.prefill)
        bad.statuses = [500]
        asked = asyncio.create_task(made.ask())
        await until(lambda: len(made.prefill.bodies) == len(made.decode.bodies) == 2)
        bad.open.set()
        await until(lambda: good.cut >= 1)
        good.open.set()
        assert (await asked)[0] == 200


async def test_a_client_that_goes_away_ends_both_legs() -> None:
    async with stand() as made:
        asked = asyncio.create_task(made.ask())
        await until(lambda: len(made.prefill.bodies) == len(made.decode.bodies) == 2)
        asked.cancel()
        await until(lambda: made.prefill.cut == made.decode.cut == 1)
