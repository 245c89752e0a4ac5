"""Requests that come while no path is up: held while an engine may be coming up, else refused at once."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from hexgen2.coordinator import RouteShare
from hexgen2.emulator import EmulatedEngine, EmulatorConfig, LinearTiming
from tests.waiting import HUNG_S, until

from .conftest import PATIENT, Stand, expected, running, text_of

HOLD = PATIENT.model_copy(update={"max_queue": 8})


async def take_out(stand: Stand, group: str) -> int:
    """Kill an engine; its port."""
    port = urlsplit(stand.engines[group].url).port
    stand.engines[group].kill()
    await until(lambda: not stand.coordinator.fleet.engines[group].up)
    assert port is not None
    return port


async def wait_for_queue(stand: Stand, number: int) -> None:
    await until(lambda: stand.coordinator.admission.waiting == number)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("told", [False, True], ids=["lately-down", "being-restarted"])
async def test_requests_wait_for_an_engine_that_comes_back(told: bool, workers: int) -> None:
    """Whoever runs the engine says so, or else it has not been down for long."""
    async with running({"p0>d0": 1.0}, limits=HOLD, workers=workers) as stand:
        port = await take_out(stand, "d0")
        if told:
            stand.coordinator.engine_ended("d0")
            stand.coordinator.engine_restarts("d0")
        asked = [asyncio.create_task(stand.stream(f"request {n}", max_tokens=5)) for n in range(6)]
        await wait_for_queue(stand, 6)
        await stand.engines["d0"].stop()
        async with EmulatedEngine(stand.engines["p0"].config).running(port):
            for number, stream in enumerate(asked):
                assert text_of(await stream) == expected(f"request {number}", 5)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_lost_stream_waits_longer_for_an_engine_that_is_being_restarted(workers: int) -> None:
    """Longer than without that word: its only engine is back when the other limit has long run out."""
    slow = EmulatorConfig(timing=LinearTiming(step_base_s=0.02))
    limits = HOLD.model_copy(update={"engine_wait_s": 0.6})
    async with running({"c0": 1.0}, emulator=slow, limits=limits, workers=workers) as stand:
        stream = asyncio.create_task(stand.stream("a b", max_tokens=30))
        await until(lambda: stand.engines["c0"].core.generation_tokens_total > 5)
        port = stand.engines["c0"].port
        stand.engines["c0"].kill()
        # In one breath: the other limit must not run out between the loss and the word.
        stand.coordinator.engine_ended("c0")
        stand.coordinator.engine_restarts("c0")
        await asyncio.sleep(2.5)
        await stand.engines["c0"].stop()
        async with EmulatedEngine(stand.engines["c0"].config).running(port):
            assert text_of(await stream) == expected("a b", 30)


async def test_an_answer_from_before_its_end_does_not_bring_an_engine_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """/health was asked before the process ended: a good answer that comes afterwards is its predecessor's."""
    async with running({"c0": 1.0}, limits=HOLD) as stand:
        door, engine = stand.coordinator, stand.coordinator.fleet.engines["c0"]
        ended, go = asyncio.Event(), asyncio.Event()

        async def answer(*_: object) -> tuple[int, bytes]:
            status = 503 if ended.is_set() else 200
            await go.wait()
            return status, b""

        monkeypatch.setattr(door._health, "_get", answer)
        asked = asyncio.create_task(door._health.poll(engine))
        await asyncio.sleep(0)
        for _ in range(2):  # the second time it is down already
            ended.set()
            door.engine_ended("c0")
            door.engine_restarts("c0")
            go.set()
            await asked
            assert (engine.up, engine.returning) == (False, True)
            ended.clear()
            go.clear()
            asked = asyncio.create_task(door._health.poll(engine))
            await asyncio.sleep(0)
        go.set()
        await asked
        assert engine.up, "its successor answers"


@pytest.mark.parametrize(
    ("told", "wait_s"), [(False, 10 * HUNG_S), (None, 0.0)], ids=["given-up", "nobody-says-and-no-time"]
)
async def test_where_none_is_coming_the_answer_is_503_at_once(told: bool | None, wait_s: float) -> None:
    limits = HOLD.model_copy(update={"engine_wait_s": wait_s})
    async with running({"p0>d0": 1.0}, limits=limits) as stand:
        await take_out(stand, "p0")
        if told is False:
            stand.coordinator.engine_given_up("p0")
        async with asyncio.timeout(HUNG_S):
            status, body, headers = await stand.post("/v1/completions", {"prompt": "a"})
        assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_engine_available", "1")


async def test_who_waits_is_told_when_the_engine_is_given_up() -> None:
    async with running({"c0": 1.0}, limits=HOLD) as stand:
        await take_out(stand, "c0")
        stand.coordinator.engine_restarts("c0")
        asked = [asyncio.create_task(stand.post("/v1/completions", {"prompt": "a"})) for _ in range(3)]
        await wait_for_queue(stand, 3)
        stand.coordinator.engine_given_up("c0")
        assert {(await one)[1]["error"]["code"] for one in asked} == {"no_engine_available"}
        assert stand.coordinator.admission.waiting == 0


async def test_holding_is_bounded_in_number() -> None:
    limits = HOLD.model_copy(update={"max_queue": 2})
    async with running({"c0": 1.0}, limits=limits) as stand:
        await take_out(stand, "c0")
        stand.coordinator.engine_restarts("c0")
        asked = [asyncio.create_task(stand.post("/v1/completions", {"prompt": "a"})) for _ in range(5)]
        await until(lambda: sum(one.done() for one in asked) == 3)
        stand.coordinator.engine_given_up("c0")
        answers = [await one for one in asked]
        assert sorted(status for status, _, _ in answers) == [429, 429, 429, 503, 503]
        assert all(int(headers["Retry-After"]) >= 1 for _, _, headers in answers)


async def test_holding_is_bounded_in_time() -> None:
    async with running({"c0": 1.0}, limits=HOLD.model_copy(update={"engine_wait_s": 0.3})) as stand:
        await take_out(stand, "c0")
        stand.coordinator.engine_restarts("c0")
        status, _, headers = await stand.post("/v1/completions", {"prompt": "a"})
        assert (status, headers["Retry-After"]) == (503, "1")


async def test_a_path_that_is_up_does_not_wait_for_another() -> None:
    async with running({"p0>d0": 0.5, "c0": 0.5}, limits=HOLD) as stand:
        await take_out(stand, "d0")
        stand.coordinator.engine_restarts("d0")
        for _ in range(4):
            await stand.complete("a", max_tokens=2)
        assert stand.engines["c0"].core.generation_tokens_total == 8


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stream_that_waits_goes_on_by_the_new_plan(workers: int) -> None:
    """No engine comes up: one that was up all the time takes the lost one's role."""
    slow = EmulatorConfig(timing=LinearTiming(step_base_s=0.005))
    shares = {"p0>d0": 0.5, "p1>d0": 0.5}
    async with running(shares, limits=HOLD, emulator=slow, workers=workers) as stand:
        asked = asyncio.create_task(stand.stream("a request", max_tokens=40))
        await until(lambda: stand.engines["d0"].core.generation_tokens_total > 5)
        await take_out(stand, "d0")
        await asyncio.sleep(0.2)  # it waits by now
        config = stand.coordinator.config
        engines = {engine.group_id: engine for engine in config.engines}
        engines["p1"] = engines["p1"].model_copy(update={"role": "decode"})
        engines["d0"] = engines["d0"].model_copy(update={"share": 0.0})
        routes = (RouteShare(prefill="p0", decode="p1", share=1.0),)
        await stand.coordinator.update(
            config.model_copy(update={"engines": tuple(engines.values()), "routes": routes})
        )
        assert text_of(await asked) == expected("a request", 40)
