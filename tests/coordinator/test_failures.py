"""Engines that fail, and clients that leave."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from hexgen2.coordinator import Limits
from hexgen2.emulator import EmulatorConfig, Fault, LinearTiming
from tests.waiting import until, until_answered

from .conftest import ALERT, MODEL, PATIENT, QUICK, Stand, expected, parse_events, running, text_of

SLOW = EmulatorConfig(timing=LinearTiming(step_base_s=0.01))
TWO_ROUTES = {"p0>d0": 0.5, "p1>d1": 0.5}
BEFORE_ANY_BYTE: list[Any] = ["die", "cut", "error_event", "finish_error", "http_500", "http_503"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leg", ["p", "d"])
@pytest.mark.parametrize("kind", BEFORE_ANY_BYTE)
async def test_a_failure_before_any_byte_is_tried_elsewhere(kind: Any, leg: str, stream: bool) -> None:
    async with running(TWO_ROUTES) as stand:
        stand.engines[f"{leg}0"].fault = Fault(kind)
        for _ in range(4):
            if stream:
                events = await stand.stream("a b", max_tokens=5)
                assert text_of(events) == expected("a b", 5)
                assert events[-1] == "[DONE]"
            else:
                assert (await stand.complete("a b", max_tokens=5))["choices"][0]["text"] == expected("a b", 5)
        assert await stand.metric("hexgen2:retries_total") >= 1
        assert await stand.metric("hexgen2:engine_failures_total", group=f"{leg}0") >= 1


async def test_a_plain_answer_lost_half_way_is_made_again(pair: Stand) -> None:
    """No byte of a plain answer has been sent before it is whole, so it can be retried at any point."""
    pair.engines["d0"].fault = Fault("cut", after_tokens=7, times=1)
    assert (await pair.complete("a b", max_tokens=9))["choices"][0]["text"] == expected("a b", 9)


@pytest.mark.parametrize(
    ("kind", "code"),
    [("http_500", "engine_http_5xx"), ("finish_error", "engine_finish_error"), ("cut", "engine_lost")],
)
async def test_the_retry_budget_ends_in_a_clear_error(kind: Any, code: str) -> None:
    async with running(TWO_ROUTES, limits=Limits(max_retries=2)) as stand:
        for group in ("d0", "d1"):
            stand.engines[group].fault = Fault(kind)
        status, body, headers = await stand.post("/v1/completions", {"prompt": "a"})
        assert (status, body["error"]["code"]) == (502, code)
        assert body["error"]["type"] == "server_error"
        assert headers["X-Request-Id"]
        assert await stand.metric("hexgen2:retries_total") == 2


@pytest.mark.parametrize("leg", ["p0", "d0"])
async def test_without_a_path_the_answer_is_503(pair: Stand, leg: str) -> None:
    pair.engines[leg].kill()
    await until(lambda: not pair.coordinator.fleet.engines[leg].up)
    pair.coordinator.engine_given_up(leg)
    async with asyncio.timeout(PATIENT.engine_wait_s / 2):
        status, body, headers = await pair.post("/v1/completions", {"prompt": "a"})
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_engine_available", "1")
    async with pair.http.get(pair.url + "/health") as response:
        assert response.status == 503
        health = await response.json()
    assert (health["status"], health["paths_up"]) == ("unavailable", 0)
    assert health["engines"][leg]["up"] is False


async def test_dead_engines_are_avoided_and_come_back() -> None:
    async with running({"c0": 0.5, "c1": 0.5}) as stand:
        port = stand.engines["c0"].port
        await stand.engines["c0"].stop()
        for _ in range(6):
            await stand.complete("a", max_tokens=1)
        assert len(stand.received("c1")) == 6
        await stand.engines["c0"].start(port)
        await until(lambda: stand.coordinator.fleet.engines["c0"].up)
        for _ in range(4):
            await stand.complete("a", max_tokens=1)
        assert stand.received("c0"), "it gets its share again"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_frozen_engine_does_not_hang_its_requests(stream: bool) -> None:
    """/health goes silent too; the watch ends what the engine works on, and the request goes elsewhere."""
    async with running({"c0": 0.5, "c1": 0.5}, timeouts=ALERT) as stand:
        stand.engines["c0"].fault = Fault("hang")
        stand.engines["c1"].fault = Fault("hang", times=0)
        body = {"prompt": "a", "max_tokens": 3, "stream": stream}
        answers = await asyncio.gather(*(stand.post("/v1/completions", body) for _ in range(4)))
        assert [status for status, _, _ in answers] == [200] * 4
        assert not stand.coordinator.fleet.engines["c0"].up
        assert await stand.metric("hexgen2:engine_failures_total", group="c0", kind="down") >= 1
        stand.engines["c0"].thaw()


async def test_silence_is_bounded_where_health_still_answers() -> None:
    slow = EmulatorConfig(timing=LinearTiming(prefill_base_s=600))
    async with running(
        {"c0": 1.0},
        emulator=slow,
        timeouts=QUICK.model_copy(update={"first_byte_s": 0.2}),
        limits=Limits(max_retries=0),
    ) as stand:
        status, body, _ = await stand.post("/v1/completions", {"prompt": "a"})
        assert (status, body["error"]["code"]) == (504, "engine_timeout")


async def test_a_request_has_an_end() -> None:
    async with running(
        {"c0": 1.0}, emulator=SLOW, timeouts=QUICK.model_copy(update={"request_s": 0.2})
    ) as stand:
        status, body, _ = await stand.post("/v1/completions", {"prompt": "a", "max_tokens": 1000})
        assert (status, body["error"]["code"]) == (504, "request_timeout")
        await until(lambda: not stand.engines["c0"].core.running)
        streamed: list[str] = []

        async def began() -> bool:
            status, text, _ = await stand.post(
                "/v1/completions", {"prompt": "a", "max_tokens": 1000, "stream": True}
            )
            streamed.append(text)
            return status == 200  # else the time was over before the first token, on a machine that was held up

        await until_answered(began)
        *chunks, error = parse_events(streamed[-1])
        assert expected("a", 1000).startswith(text_of(chunks))
        assert error["error"]["code"] == "request_timeout"


async def test_a_client_that_hangs_up_is_no_failure_of_the_engine(pair: Stand) -> None:
    """The write to the client fails before the server has noticed that it is gone."""
    from aiohttp import web

    write = web.StreamResponse.write

    real = aiohttp.ClientSession()
    try:
        with pytest.MonkeyPatch.context() as patch:

            async def only_the_coordinator(self: web.StreamResponse, data: bytes) -> None:
                # The emulated engines write the same events; theirs still carry the token ids.
                if b"cmpl-gone" in data and b'"token_ids":null' in data:
                    raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
                await write(self, data)

            patch.setattr(web.StreamResponse, "write", only_the_coordinator)
            body = {"prompt": "a", "stream": True, "max_tokens": 5}

            async def ask() -> None:
                headers = {"X-Request-Id": "gone"}
                async with real.post(pair.url + "/v1/completions", json=body, headers=headers) as response:
                    await response.read()

            asked = asyncio.create_task(ask())
            await pair.counted(1, "hexgen2:requests_cancelled_total")
            asked.cancel()
            with pytest.raises((aiohttp.ClientError, asyncio.CancelledError)):
                await asked
    finally:
        await real.close()
    assert await pair.metric("hexgen2:engine_failures_total") == 0
    assert await pair.metric("hexgen2:migrations_total") == 0


@pytest.mark.parametrize("kind", ["error_event", "finish_error", "die", "cut"])
async def test_a_stream_that_cannot_go_on_ends_with_an_error_event(kind: Any) -> None:
    """With nowhere to go the client gets what came, then an error, and no `[DONE]`."""
    async with running({"c0": 1.0}, limits=Limits(max_retries=0, max_migrations=0)) as stand:
        stand.engines["c0"].fault = Fault(kind, after_tokens=4)
        *chunks, error = await stand.stream("a b", max_tokens=10)
        assert text_of(chunks) == expected("a b", 4)
        assert error["error"]["type"] == "server_error"
        assert "c0" in error["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_the_decode_leg(stream: bool) -> None:
    async with running({"p0>d0": 1.0}, emulator=SLOW) as stand:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 10_000, "stream": stream}
        task = asyncio.create_task(stand.post("/v1/completions", body))
        await until(lambda: stand.engines["d0"].core.running)
        task.cancel()
        await until(lambda: not stand.engines["d0"].core.running)
        assert stand.engines["d0"].core.aborted_total == 1
        await until(lambda: stand.coordinator.fleet.engines["d0"].in_flight == 0)
        await stand.counted(1, "hexgen2:requests_cancelled_total")


async def test_a_client_that_leaves_cancels_the_prefill_leg() -> None:
    slow = EmulatorConfig(timing=LinearTiming(prefill_base_s=600))
    async with running({"p0>d0": 1.0}, emulator=slow) as stand:
        task = asyncio.create_task(stand.complete("a"))
        await until(lambda: stand.engines["p0"].core.running)
        task.cancel()
        await until(lambda: not stand.engines["p0"].core.running)
        assert stand.received("d0") == []


async def test_a_client_that_hangs_up_mid_stream(pair: Stand) -> None:
    """A raw connection that is reset, as a killed client leaves it."""
    pair.engines["d0"].core.timing = LinearTiming(step_base_s=0.01)
    async with aiohttp.ClientSession() as session:
        body = {"prompt": "a", "max_tokens": 10_000, "stream": True}
        response = await session.post(pair.url + "/v1/completions", json=body)
        await response.content.readany()
        assert response.connection is not None
        assert response.connection.transport is not None
        response.connection.transport.abort()
    await until(lambda: not pair.engines["d0"].core.running)
    await until(lambda: pair.coordinator.fleet.engines["d0"].in_flight == 0)


async def test_prefill_that_hands_over_no_cache_still_gives_right_tokens(
    pair: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leg 1 whose answer has null kv_transfer_params: the decode engine computes the prompt itself."""
    monkeypatch.setattr(pair.engines["p0"].kv_store, "offer", lambda *_: None)
    assert (await pair.complete("a b", max_tokens=4))["choices"][0]["text"] == expected("a b", 4)
    assert "kv_transfer_params" not in pair.received("d0")[0]
    assert await pair.metric("hexgen2:legs_without_kv_total") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prefill_engine_that_dies_between_the_legs(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode engine answers 500 since it cannot fetch the cache; the prompt is computed again elsewhere."""
    async with running(TWO_ROUTES) as stand:
        decode = stand.engines["d0"]
        receive = decode._receive

        async def after_the_death(*arguments: Any) -> Any:
            stand.engines["p0"].kill()
            return await receive(*arguments)

        monkeypatch.setattr(decode, "_receive", after_the_death)
        body = {"prompt": "a b", "stream": stream}
        answers = [await stand.post("/v1/completions", body) for _ in range(4)]
        assert [status for status, _, _ in answers] == [200] * 4
        for _, answer, _ in answers:
            text = text_of(parse_events(answer)) if stream else answer["choices"][0]["text"]
            assert text == expected("a b", 16)
        # The decode engine says so, unless the watch is quicker to find the prefill engine gone; which may be
        # asked once more before it does.
        assert await stand.metric("hexgen2:engine_failures_total") in (1, 2)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prefill_engine_that_freezes_between_the_legs(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode engine would wait for the cache as long as the prefill engine stays silent."""
    async with running(TWO_ROUTES, timeouts=ALERT) as stand:
        frozen: list[str] = []
        for name in ("0", "1"):
            decode, receive = stand.engines[f"d{name}"], stand.engines[f"d{name}"]._receive

            async def after_the_freeze(*arguments: Any, name: str = name, receive: Any = receive) -> Any:
                if not frozen:
                    frozen.append(f"p{name}")
                    stand.engines[f"p{name}"].freeze()
                return await receive(*arguments)

            monkeypatch.setattr(decode, "_receive", after_the_freeze)
        async with asyncio.timeout(25):  # the emulated engine itself would give up after 30 s
            _, answer, _ = await stand.post("/v1/completions", {"prompt": "a b", "stream": stream})
        text = text_of(parse_events(answer)) if stream else answer["choices"][0]["text"]
        assert text == expected("a b", 16)
        assert await stand.metric("hexgen2:engine_failures_total", group=frozen[0], kind="down") >= 1
        assert not any(engine.feeding for engine in stand.coordinator.fleet.engines.values())
        stand.engines[frozen[0]].thaw()


async def test_a_plain_request_waits_for_its_engine_to_come_back() -> None:
    """The only engine is lost and started again: nothing was sent, so the client need not know."""
    async with running({"c0": 1.0}, emulator=SLOW) as stand:
        engine = stand.engines["c0"]
        task = asyncio.create_task(stand.complete("a b", max_tokens=20))
        await until(lambda: engine.core.generation_tokens_total > 5)
        port = engine.port
        engine.kill()
        await until(lambda: not stand.coordinator.fleet.engines["c0"].up)
        await engine.stop()
        engine.healthy = True
        engine.thaw()
        await engine.start(port)
        assert (await task)["choices"][0]["text"] == expected("a b", 20)
        assert await stand.metric("hexgen2:retries_total") >= 1
