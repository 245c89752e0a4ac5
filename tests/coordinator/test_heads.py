"""Clients that connect and say nothing, or say it byte by byte."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest

from tests.waiting import HUNG_S, until, until_answered

from .conftest import QUICK, running

SHORT = QUICK.model_copy(update={"headers_s": 0.4})
HEAD = b"GET /version HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 10_000


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sent", ["nothing", "dribble"])
async def test_a_head_that_does_not_come_ends_its_connection(sent: str, workers: int) -> None:
    async with running({"c0": 1.0}, timeouts=SHORT, workers=workers) as stand:
        port = int(stand.url.rsplit(":", 1)[1])
        ends = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]

        async def dribble() -> None:
            for place in range(len(HEAD)):
                for _, writer in ends:
                    writer.write(HEAD[place : place + 1])
                await asyncio.sleep(0.01)

        speaking = asyncio.create_task(dribble()) if sent == "dribble" else None
        for reader, _ in ends:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), HUNG_S) == b""
        if speaking is not None:
            speaking.cancel()
        for _, writer in ends:
            writer.close()
        # Others are served as ever, and their connections are kept.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:

            async def answers() -> bool:
                # A machine that is held up may be as slow to send a head, once.
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(stand.url + "/version") as response:
                        return response.status == 200
                return False

            for _ in range(2):
                await until_answered(answers)
                await asyncio.sleep(0.7)


async def test_a_request_that_runs_long_is_no_silent_client() -> None:
    async with running({"c0": 1.0}, timeouts=SHORT) as stand:
        stand.engines["c0"].core.freeze()
        task = asyncio.create_task(stand.complete("a", max_tokens=2))
        await until(lambda: stand.coordinator.fleet.engines["c0"].in_flight == 1)
        await asyncio.sleep(0.7)
        stand.engines["c0"].core.thaw()
        assert (await task)["usage"]["completion_tokens"] == 2
