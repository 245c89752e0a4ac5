"""Calls of engines at awkward moments."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from typing import Any

import pytest

from hexgen2.coordinator import EngineEndpoint, Timeouts
from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.errors import EngineFailure
from hexgen2.coordinator.upstream import Connection, Pool
from tests.waiting import until

from .conftest import Stand, expected, running

CONNECT_S = 0.2


class Desk:
    """A desk of one engine, as far as a call asks it."""

    def __init__(self) -> None:
        endpoint = EngineEndpoint(group_id="c0", role="colocated", url="http://127.0.0.1:9", share=1.0)
        self.engines = {"c0": Engine(endpoint)}

    def leg(self, engine: Engine, by: int) -> None:
        engine.in_flight += by


async def test_an_engine_goes_down_in_the_turn_in_which_a_connection_takes_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever takes the engine out (the health watch) must not be hit by it: its task would end."""

    async def never(_: Pool) -> Connection:
        for_ever: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        return await for_ever

    monkeypatch.setattr(Pool, "connect", never)
    loop, mistakes = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, context: mistakes.append(context))
    desk: Any = Desk()
    client = EngineClient(desk, Timeouts(connect_s=CONNECT_S))

    async def ask() -> None:
        async with client.call("c0") as call:
            await call.open("/v1/completions", b"{}", {}, 5.0)

    asked = asyncio.create_task(ask())
    await asyncio.sleep(0)
    loop.call_later(CONNECT_S + 1e-4, desk.engines["c0"].end_work, "it is gone", False)
    loop.call_soon(time.sleep, 2 * CONNECT_S)  # both timers are due when this is over
    with pytest.raises(EngineFailure, match="it is gone"):
        await asked
    assert mistakes == []


@pytest.mark.parametrize("lack", [errno.EMFILE, errno.EADDRNOTAVAIL])
async def test_what_this_machine_lacks_is_not_held_against_an_engine(
    lack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor for one more connection the streams that run go on."""
    async with running({"c0": 1.0}) as stand:
        went_down: list[str] = []
        monkeypatch.setattr(
            stand.coordinator.fleet, "mark_down", lambda engine, *_: went_down.append(engine.id)
        )
        polled = stand.coordinator.fleet.engines["c0"]

        async def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(lack, os.strerror(lack))

        monkeypatch.setattr(Pool, "connect", refuse)
        monkeypatch.setattr(stand.coordinator._client.probes.connector, "_create_connection", refuse)
        before = polled.missed_polls
        status, body, _ = await stand.post("/v1/completions", {"prompt": "a"})
        assert (status, body["error"]["code"]) == (502, "engine_connect")
        await stand.coordinator._health.poll(polled)
        assert (went_down, polled.up, polled.missed_polls) == ([], True, before)


async def _leg_1_outlives_its_decode_engine(stand: Stand) -> None:
    from .test_update import config_of

    frozen = stand.engines["p0"]
    frozen.freeze()
    asked = asyncio.create_task(stand.post("/v1/completions", {"prompt": "a b", "max_tokens": 4}))
    await until(lambda: stand.coordinator.fleet.engines["p0"].in_flight == 1)
    await stand.coordinator.update(config_of(stand, {"p0>d1": 1.0}))
    assert not await stand.coordinator.retire("d0", within_s=0.01)
    assert "d0" not in stand.coordinator.fleet.engines
    frozen.thaw()
    status, answer, _ = await asked
    assert status == 200, answer
    assert answer["choices"][0]["text"] == expected("a b", 4)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_decode_engine_that_is_taken_out_while_the_prompt_is_computed(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hexgen2.coordinator.service._LAST_S", 0.01)
    # A share of 0 would never be chosen: all goes to d0 at first.
    async with running({"p0>d0": 1.0, "p0>d1": 0.0}, workers=workers) as stand:
        await _leg_1_outlives_its_decode_engine(stand)
