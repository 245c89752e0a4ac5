"""Ten thousand requests of all kinds, many of them rude: descriptors, tasks and memory come back."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.chaos.fleet import MODEL, Door, door, emulated
from tests.waiting import until_answered

KINDS = ("plain", "plain", "plain", "stream", "stream", "leave", "leave", "bad", "lost", "half a body")
WARM_UP, REQUESTS, AT_ONCE = 1500, 10_000, 40


async def one(http: aiohttp.ClientSession, url: str, number: int, kind: str) -> None:
    body = {"model": MODEL, "prompt": f"request {number}", "max_tokens": 4}
    target = url + "/v1/completions"
    if kind == "plain":
        async with http.post(target, json=body) as response:
            assert (await response.json())["usage"]["completion_tokens"] == 4
    elif kind == "stream":
        async with http.post(target, json=body | {"stream": True}) as response:
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
    elif kind == "leave":  # in the middle of the stream
        async with http.post(target, json=body | {"stream": True, "max_tokens": 4000}) as response:
            await response.content.readany()
            response.close()
    elif kind == "bad":
        async with http.post(target, data=b'{"prompt": ') as response:
            assert response.status == 400
    elif kind == "lost":
        async with http.post(url + "/v2/nowhere", json=body) as response:
            assert response.status == 404
    else:  # the client dies before its body is whole
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        await writer.drain()
        writer.transport.abort()


async def load(front: Door, count: int, draw: random.Random) -> None:
    numbers = iter(range(count))

    async def worker(http: aiohttp.ClientSession) -> None:
        for number in numbers:
            async with asyncio.timeout(30):
                await one(http, front.url, number, draw.choice(KINDS))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(worker(http) for _ in range(AT_ONCE)))


async def at_rest(front: Door) -> tuple[int, int]:
    """(open descriptors, tasks) once the coordinator has nothing to do and its idle connections are closed."""
    process = psutil.Process(front.pid)

    async def idle() -> bool:
        return not (await front.metrics())["hexgen2:requests_in_flight"]

    await until_answered(idle, within_s=20, every_s=0.1)
    await asyncio.sleep(6.0)
    return process.num_fds(), int((await front.metrics())["hexgen2:tasks"])


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_nothing_is_left_behind(tmp_path: Path) -> None:
    draw = random.Random(1)
    async with emulated(1, 2, 1, step_s=0.001) as (config, _), door(config, tmp_path) as front:
        await front.wait_whole(20)
        await load(front, WARM_UP, draw)
        before, memory = await at_rest(front), psutil.Process(front.pid).memory_info().rss
        await load(front, REQUESTS, draw)
        after, grown = await at_rest(front), psutil.Process(front.pid).memory_info().rss - memory
        engines = (await front.health())["engines"].values()
        print(f"descriptors and tasks: {before} before, {after} after; memory grew by {grown / 2**20:.1f} MiB")
    assert {engine["in_flight"] for engine in engines} == {0}
    assert all(now <= then + 3 for now, then in zip(after, before, strict=True))
    assert grown < 10 * 2**20
