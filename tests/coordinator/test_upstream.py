"""The HTTP client for engines: framing, connections used again, and a slow taker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial

import aiohttp
import pytest
import uvloop

from hexgen2.coordinator import Coordinator, CoordinatorConfig, EngineEndpoint, Limits, Timeouts
from hexgen2.coordinator.upstream import Connection, Pool
from tests.waiting import HUNG_S, until, until_answered

from .conftest import MODEL, QUICK

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
GOOD = HEAD + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n"


@dataclass
class Got:
    """A receiver that writes down what it is told."""

    status: int = 0
    content_type: str = ""
    body: bytes = b""
    whole: bool | None = None
    end: asyncio.Event = field(default_factory=asyncio.Event)

    def headed(self, status: int, content_type: str) -> None:
        self.status, self.content_type = status, content_type

    def received(self, data: bytes) -> None:
        self.body += data

    def ended(self, whole: bool) -> None:
        self.whole = whole
        self.end.set()


@contextlib.asynccontextmanager
async def serving(answer: bytes, piece: int, close: bool) -> AsyncIterator[tuple[str, list[int]]]:
    """A server that answers every request of 4 bytes with these bytes, so many at a time; its address, and for
    each of its connections the number of requests."""
    asked: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(0)
        place = len(asked) - 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\nbody")
                asked[place] += 1
                for begin in range(0, len(answer), piece):
                    writer.write(answer[begin : begin + piece])
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    break
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


async def post(pool: Pool) -> tuple[Got, Connection]:
    connection, got = pool.take() or await pool.connect(), Got()
    connection.send(got, "/x", {"A": "b"}, b"body")
    await asyncio.wait_for(got.end.wait(), HUNG_S)
    connection.release(done=False)
    return got, connection


def run(loop: str, main: Callable[[], Coroutine[None, None, None]]) -> None:
    """On uvloop, which serves where it can be had, and on asyncio's own."""
    uvloop.run(main()) if loop == "uvloop" else asyncio.run(main())


def closed(connection: Connection) -> bool:
    return not connection.usable


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("piece", [1, 7, 4096])
@pytest.mark.parametrize(
    ("answer", "close", "whole", "connections"),
    [
        (GOOD, False, True, 1),
        (CHUNKED, False, True, 1),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD, False, True, 1),
        (HEAD + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello", True, True, 2),
        (HEAD + b"\r\nhello", True, True, 2),  # no length: the connection's end is the body's
        (HEAD + b"Content-Length: 9\r\n\r\nhello", True, False, 2),
        (CHUNKED[:-5], True, False, 2),
        (HEAD[:-9], True, False, 2),
        (b"HELLO\r\n\r\n", False, False, 2),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", False, False, 2),
        (GOOD + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad", False, True, 2),  # one more than asked for
    ],
)
def test_answers(loop: str, piece: int, answer: bytes, close: bool, whole: bool, connections: int) -> None:
    async def main() -> None:
        async with serving(answer, piece, close) as (url, asked):
            pool = Pool(url)
            for _ in range(2):
                got, connection = await post(pool)
                assert got.whole is whole
                if whole:
                    assert (got.status, got.content_type, got.body) == (200, "text/plain", b"hello")
                if connections == 2:  # it is closed, at the latest when the surplus has come
                    await until(partial(closed, connection))
            assert asked == ([2] if connections == 1 else [1, 1])
            pool.close()

    run(loop, main)


def test_headers_stay_headers() -> None:
    async def main() -> None:
        async with serving(GOOD, 4096, False) as (url, asked):
            connection = await Pool(url).connect()
            for bad in ("a\r\nInjected: 1", "a\nb", "a\rb"):
                with pytest.raises(ValueError, match="line break"):
                    connection.send(Got(), "/x", {"A": bad}, b"body")
            connection.close()
            assert asked in ([], [0])

    asyncio.run(main())


def test_idle_connections_are_closed_in_time() -> None:
    async def main() -> None:
        async with serving(GOOD, 4096, False) as (url, _):
            pool = Pool(url)
            await post(pool)
            now = asyncio.get_running_loop().time()
            pool.close_old(now + 1.0)
            kept = pool.take()
            assert kept is not None
            kept.release(done=False)
            pool.close_old(now + 10.0)
            assert pool.take() is None

    asyncio.run(main())


def test_a_connection_that_was_paused_serves_again() -> None:
    async def main() -> None:
        async with serving(GOOD, 4096, False) as (url, asked):
            pool = Pool(url)
            _, connection = await post(pool)
            connection.pause()
            connection.release(done=False)
            await post(pool)
            assert asked == [2]
            pool.close()

    asyncio.run(main())


EVENT = b'data: {"choices":[{"index":0,"text":"' + b"x" * 65_000 + b'","finish_reason":null}]}\n\n'
EVENTS = 1000


@contextlib.asynccontextmanager
async def streaming(
    engine: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], timeouts: Timeouts
) -> AsyncIterator[tuple[Coordinator, aiohttp.ClientSession, aiohttp.ClientResponse]]:
    """A coordinator before one engine, and a stream through both that nobody has read from yet."""
    server = await asyncio.start_server(engine, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    config = CoordinatorConfig(
        served_model_names=(MODEL,),
        engines=(EngineEndpoint(group_id="c0", role="colocated", url=url, share=1.0),),
        timeouts=timeouts,
        limits=Limits(max_migrations=0),
    )
    body = {"model": MODEL, "prompt": "a", "stream": True}
    async with (
        server,
        Coordinator(config).running() as coordinator,
        aiohttp.ClientSession(read_bufsize=2**14) as http,
        http.post(coordinator.url + "/v1/completions", json=body) as response,
    ):
        yield coordinator, http, response


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_an_engine_waits_for_a_client_that_does_not_read(loop: str) -> None:
    """65 MB for a client that takes its time: they stay in the engine, and come whole in the end."""
    sent = 0

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        request = await reader.readuntil(b"\r\n\r\n")
        if not request.startswith(b"POST"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            writer.write(HEAD.replace(b"plain", b"event-stream") + b"Transfer-Encoding: chunked\r\n\r\n")
            for data in [EVENT] * EVENTS + [b"data: [DONE]\n\n"]:
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                await writer.drain()
                sent += len(data)
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with streaming(engine, QUICK) as (_, _, response):
            seen = -1
            while not sent or seen != sent:  # until nothing moves any more
                seen = sent
                await asyncio.sleep(0.2)
            assert (
                0 < sent < EVENTS * len(EVENT) * 3 / 4
            )  # what the kernel's buffers hold is the machine's matter
            total = 0
            async for data in response.content.iter_any():
                total += len(data)
            assert total == EVENTS * len(EVENT) + len(b"data: [DONE]\n\n")

    run(loop, main)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_client_that_takes_nothing_any_more_is_cut_off(loop: str) -> None:
    """It would hold its place at the engine for as long as a request may take."""

    async def main() -> None:
        stopped = asyncio.Event()

        async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            request = await reader.readuntil(b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                if not request.startswith(b"POST"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    await writer.drain()
                else:
                    writer.write(
                        HEAD.replace(b"plain", b"event-stream") + b"Transfer-Encoding: chunked\r\n\r\n"
                    )
                    try:
                        while True:
                            writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                            await writer.drain()
                    finally:
                        stopped.set()
            writer.close()

        async with streaming(engine, QUICK.model_copy(update={"take_s": 0.3})) as (coordinator, http, _):
            await until(stopped.is_set)
            await until(lambda: coordinator.fleet.engines["c0"].placed == 0)

            async def is_counted() -> bool:
                async with http.get(coordinator.url + "/metrics") as metrics:
                    return "hexgen2:requests_cancelled_total 1.0" in await metrics.text()

            await until_answered(is_counted)

    run(loop, main)
