"""Several worker processes with one owner: what holds for one process holds for all of them together."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import trustme

from hexgen2.coordinator import ApiKeys, Coordinator, Limits, RouteShare, Tls, WorkersFailed
from hexgen2.coordinator.desk import LocalDesk
from hexgen2.coordinator.workers import listening, pool
from hexgen2.coordinator.workers.link import Link
from hexgen2.deploy import free_ports
from hexgen2.emulator import EmulatorConfig, LinearTiming
from hexgen2.specs.errors import InputError
from tests.waiting import HUNG_S, until, until_answered

from .conftest import MODEL, QUICK, Stand, expected, parse_events, running, text_of
from .test_security import knowing, version, write

SLOW = EmulatorConfig(timing=LinearTiming(step_base_s=0.02))
PAIRS = {"p0>d0": 0.75, "p0>d1": 0.25}


async def ask(stand: Stand, prompt: str = "a b", **body: Any) -> tuple[int, list[Any]]:
    """A stream over a connection of its own, so that the kernel spreads them: status and events."""
    sent = {"model": MODEL, "prompt": prompt, "stream": True, **body}
    headers = {"Connection": "close", **stand.headers}
    async with stand.http.post(stand.url + "/v1/completions", json=sent, headers=headers) as response:
        text = await response.text()
        return response.status, parse_events(text) if response.status == 200 else [text]


def whole(events: list[Any], prompt: str, tokens: int) -> bool:
    return text_of(events) == expected(prompt, tokens) and events[-1] == "[DONE]"


async def by_worker(stand: Stand) -> list[float]:
    return [await stand.metric("hexgen2:worker_requests_total", worker=str(place)) for place in range(2)]


async def settled(stand: Stand) -> None:
    """A worker tells what became of a request when its answer has been sent: the end of it comes last."""
    workers = stand.coordinator.workers
    assert workers is not None
    await until(lambda: not any(link.serving for link in workers.links))


def holds_of(stand: Stand) -> int:
    """What the owner keeps for its workers' requests."""
    assert stand.coordinator.workers is not None
    return sum(link.holds for link in stand.coordinator.workers.links)


def nothing_held(stand: Stand) -> bool:
    engines = stand.coordinator.fleet.engines.values()
    return all(e.placed == 0.0 == e.in_flight and e.held == 0 and e.gate.inside == 0 for e in engines)


async def test_shares_and_metrics_are_those_of_one() -> None:
    async with running(PAIRS, workers=2) as stand:
        answers = await asyncio.gather(*(ask(stand, f"request {n}", max_tokens=5) for n in range(80)))
        assert all(whole(events, f"request {n}", 5) for n, (_, events) in enumerate(answers))
        await settled(stand)
        assert min(await by_worker(stand)) > 10
        routed = [await stand.metric("hexgen2:route_requests_total", target=name) for name in ("d0", "d1")]
        assert sum(routed) == 80
        assert abs(routed[0] - 60) <= 6  # bent a bounded way by the load of the moment, as with one process
        assert await stand.metric("hexgen2:requests_total", status="200") == 80
        assert await stand.metric("hexgen2:output_tokens_total") == 400
        assert await stand.metric("hexgen2:time_to_first_token_seconds_count") == 80
        assert await stand.metric("hexgen2:requests_in_flight") == 0
        await until(lambda: nothing_held(stand))


async def test_what_is_not_generation_is_answered_too() -> None:
    async with running({"p0>d0": 1.0}, workers=2) as stand:
        for path, status in (("/health", 200), ("/v1/models", 200), (f"/v1/models/{MODEL}", 200), ("/no", 404)):
            async with stand.http.get(stand.url + path) as response:
                assert response.status == status, path
                assert (await response.json()).keys() & {"status", "data", "id", "error"}
        status, answer, _ = await stand.post("/tokenize", {"model": MODEL, "prompt": "a b c"})
        assert (status, answer["count"]) == (200, 3)
        assert (await stand.post("/v1/embeddings", {}))[1]["error"]["code"] == "endpoint_not_served"
        async with stand.http.get(stand.url + "/v1/completions") as response:
            assert response.status in (404, 405)
        answer = await stand.complete("a b c", max_tokens=7)
        assert answer["choices"][0]["text"] == expected("a b c", 7)
        bad, error, _ = await stand.post("/v1/completions", {"model": "unknown", "prompt": "a"})
        assert (bad, error["error"]["code"]) == (404, "model_not_found")


async def test_bounds_hold_over_all_workers() -> None:
    """Four places and six that may wait: of thirty at once twenty are refused, whichever worker has them."""
    limits = Limits(capacity_factor=1.0, max_queue=6, queue_wait_s=HUNG_S)
    async with running({"c0": 1.0}, emulator=SLOW, limits=limits, batch=4, workers=2) as stand:
        most, engine = 0, stand.coordinator.fleet.engines["c0"]

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, int(engine.placed))
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        # The engine stands still until all but those that wait have been refused.
        stand.engines["c0"].freeze()
        asked = [asyncio.create_task(ask(stand, max_tokens=30)) for _ in range(30)]
        await until(lambda: sum(one.done() for one in asked) == 20)
        stand.engines["c0"].thaw()
        answers = await asyncio.gather(*asked)
        watching.cancel()
        assert sorted(status for status, _ in answers) == [200] * 10 + [429] * 20
        assert most == 4
        assert min(await by_worker(stand)) > 0
        await until(lambda: nothing_held(stand))


async def test_keys_count_over_all_workers_and_change_in_all(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n")
    limits = Limits(max_in_flight_per_key=3)
    keys = ApiKeys.from_file(file)
    async with running({"c0": 1.0}, emulator=SLOW, limits=limits, keys=keys, workers=2) as stand:
        stand.headers = {"Authorization": "Bearer first"}
        stand.engines["c0"].freeze()
        asked = [asyncio.create_task(ask(stand, max_tokens=20)) for _ in range(12)]
        await until(lambda: sum(one.done() for one in asked) == 9)
        stand.engines["c0"].thaw()
        assert sorted(status for status, _ in await asyncio.gather(*asked)) == [200] * 3 + [429] * 9
        file.write_text("second\n")
        stand.coordinator.reload()

        async def all_say(status: int) -> bool:
            return {(await ask(stand, max_tokens=1))[0] for _ in range(8)} == {status}

        await until_answered(partial(all_say, 401))
        stand.headers = {"Authorization": "Bearer second"}
        await until_answered(partial(all_say, 200))  # which worker read the file first, nobody says


async def test_engines_that_die_and_others_that_come_reach_all_workers() -> None:
    async with running({"p0>d0": 0.5, "p0>d1": 0.5}, emulator=SLOW, workers=2) as stand:
        streams = [asyncio.create_task(ask(stand, f"request {n}", max_tokens=40)) for n in range(16)]
        await until(lambda: stand.engines["d0"].core.generation_tokens_total > 20)
        stand.engines["d0"].kill()
        answers = await asyncio.gather(*streams)
        assert all(whole(events, f"request {n}", 40) for n, (_, events) in enumerate(answers))
        await settled(stand)
        assert await stand.metric("hexgen2:migrations_total") >= 2
        assert await stand.metric("hexgen2:engine_failures_total", group="d0") >= 2
        # Another config: everything to d1.
        config = stand.coordinator.config
        left = tuple(engine for engine in config.engines if engine.group_id != "d0")
        routes = (RouteShare(prefill="p0", decode="d1", share=1.0),)
        await stand.coordinator.update(config.model_copy(update={"engines": left, "routes": routes}))
        await stand.coordinator.retire("d0", HUNG_S)
        answers = await asyncio.gather(*(ask(stand, f"later {n}", max_tokens=4) for n in range(16)))
        assert all(whole(events, f"later {n}", 4) for n, (_, events) in enumerate(answers))
        await until(lambda: nothing_held(stand))


async def test_a_killed_worker_takes_only_its_own_requests() -> None:
    # So slowly at first that none ends before all have come, however long that takes.
    slow = EmulatorConfig(timing=LinearTiming(step_base_s=0.2))
    async with running({"p0>d0": 1.0}, emulator=slow, workers=2) as stand:
        workers, core = stand.coordinator.workers, stand.engines["d0"].core
        assert workers is not None
        before = workers.pids
        streams = [asyncio.create_task(ask(stand, f"request {n}", max_tokens=200)) for n in range(24)]
        await until(lambda: len(core.running) == 24 and core.generation_tokens_total >= 24)
        taken = await by_worker(stand)
        os.kill(before[0], signal.SIGKILL)
        core.timing = LinearTiming()
        done = await asyncio.gather(*streams, return_exceptions=True)
        broken = [answer for answer in done if isinstance(answer, aiohttp.ClientError)]
        good = [n for n, a in enumerate(done) if isinstance(a, tuple) and whole(a[1], f"request {n}", 200)]
        assert [len(broken), len(good)] == taken, done
        await until(lambda: nothing_held(stand))

        async def is_back() -> bool:
            return await stand.metric("hexgen2:workers_up") == 2

        await until_answered(is_back)
        assert await stand.metric("hexgen2:worker_restarts_total") == 1
        assert len(set(workers.pids) | set(before)) == 3
        answers = await asyncio.gather(*(ask(stand, f"later {n}", max_tokens=4) for n in range(24)))
        assert all(whole(events, f"later {n}", 4) for n, (_, events) in enumerate(answers))
        assert (await by_worker(stand))[0] > taken[0]


async def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment without a free process or descriptor must not cost a worker for ever."""
    async with running({"c0": 1.0}, workers=2) as stand:
        workers = stand.coordinator.workers
        assert workers is not None
        start, refused = asyncio.create_subprocess_exec, list[OSError]()

        async def refuse_once(*command: Any, **options: Any) -> asyncio.subprocess.Process:
            if not refused:
                refused.append(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
                raise refused[0]
            return await start(*command, **options)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_once)
        before = workers.pids
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: len(set(workers.pids) - set(before)) == 1)
        assert refused


async def test_workers_that_cannot_be_had_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = asyncio.create_subprocess_exec, list[asyncio.subprocess.Process]()
    asked = itertools.count()

    async def only_one(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        if next(asked):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(await start(*command, **options))
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", only_one)
    with pytest.raises(InputError, match=r"--workers: 2 cannot be started here \(Resource temp"):
        async with running({"c0": 1.0}, workers=2):
            pass
    assert all(process.returncode is not None for process in started), "the other one is ended"


async def test_a_worker_that_ends_at_once_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(WorkersFailed, match=r"worker [01] ended \(1\) while it started"):
        async with running({"c0": 1.0}, workers=2):
            pass


async def test_more_workers_than_descriptors_are_told_in_one_line(tmp_path: Path) -> None:
    async with running({"c0": 1.0}) as stand:
        file = tmp_path / "config.json"
        stand.coordinator.config.save(file)
        command = [sys.executable, "-m", "hexgen2.coordinator", "--config", str(file), "--port", "0"]
        limited = f"ulimit -n 100; exec {shlex.join(command)} --workers 200 --log-level error"
        process = await asyncio.create_subprocess_shell(limited, stderr=asyncio.subprocess.PIPE)
        _, text = await asyncio.wait_for(process.communicate(), HUNG_S)
        assert process.returncode == 2
        (line,) = text.decode().splitlines()
        assert line.startswith("--workers: 200 cannot be started here (Too many open files)")


async def test_a_worker_that_hangs_is_replaced() -> None:
    """Who connects to it meanwhile waits for the next one: the owner keeps its socket."""
    async with running({"c0": 1.0}, workers=2) as stand:
        workers = stand.coordinator.workers
        assert workers is not None
        frozen, link = workers.pids[1], workers.links[1]
        os.kill(frozen, signal.SIGSTOP)
        link.unanswered = pool._UNANSWERED  # as if the owner had asked for so long already
        answers = await asyncio.gather(*(ask(stand, f"request {n}", max_tokens=4) for n in range(12)))
        # Connections that the frozen process had accepted broke; here none can be, it was frozen before.
        assert all(whole(events, f"request {n}", 4) for n, (_, events) in enumerate(answers))
        await until(lambda: frozen not in workers.pids)


async def test_legs_end_at_the_engine_that_they_began_at() -> None:
    """Its successor of the same name has none of them, however late the worker tells."""
    async with running({"c0": 1.0}) as stand:
        door = stand.coordinator
        desk, old = LocalDesk(door.fleet, door.admission), door.fleet.engines["c0"]
        link = Link(desk, door.metrics, door.metrics.worker_requests.labels("0"), lambda: None)
        for _ in range(2):
            link._take(["leg", "c0", 1])
        door.fleet.mark_down(old, "it is to be dead in this test")
        moved = old.endpoint.model_copy(update={"url": "http://127.0.0.1:1"})
        door.fleet.update(door.config.model_copy(update={"engines": (moved,)}))
        new = door.fleet.engines["c0"]
        link._take(["leg", "c0", 1])
        assert (old.in_flight, new.in_flight) == (2, 1)
        link._take(["leg", "c0", -1])
        link._gone()
        assert (old.in_flight, new.in_flight) == (0, 0)


async def test_draining_ends_workers_with_their_last_request() -> None:
    async with running({"c0": 1.0}, emulator=SLOW, workers=2) as stand:
        streams = [asyncio.create_task(ask(stand, f"request {n}", max_tokens=40)) for n in range(8)]
        await until(lambda: stand.engines["c0"].core.generation_tokens_total > 8)
        assert await stand.coordinator.drain()
        for n, stream in enumerate(streams):
            assert whole((await stream)[1], f"request {n}", 40)
        with pytest.raises(aiohttp.ClientConnectionError):
            await ask(stand)


async def test_sigterm_drains_the_whole_tree(tmp_path: Path) -> None:
    async with running({"c0": 1.0}, emulator=SLOW, timeouts=QUICK) as stand:
        file, port = tmp_path / "config.json", free_ports()("127.0.0.1")
        stand.coordinator.config.save(file)
        command = (sys.executable, "-m", "hexgen2.coordinator", "--config", str(file), "--port", str(port))
        process = await asyncio.create_subprocess_exec(*command, "--workers", "2")
        url = f"http://127.0.0.1:{port}"

        async def serves() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                async with stand.http.get(url + "/health") as response:
                    return response.status == 200
            return False

        await until_answered(serves, every_s=0.05)
        family = [process.pid, *(one.pid for one in psutil.Process(process.pid).children())]
        assert len(family) == 3
        body = {"model": MODEL, "prompt": "a b", "stream": True, "max_tokens": 60}
        async with stand.http.post(url + "/v1/completions", json=body) as response:
            await response.content.readany()
            process.terminate()
            text = (await response.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert await asyncio.wait_for(process.wait(), HUNG_S) == 0
        assert not any(map(psutil.pid_exists, family))


async def test_clients_that_leave_free_their_places() -> None:
    async with running({"p0>d0": 1.0}, emulator=SLOW, workers=2) as stand:
        streams = [asyncio.create_task(ask(stand, max_tokens=100_000)) for _ in range(24)]
        await until(lambda: len(stand.engines["d0"].core.running) == 24)
        for stream in streams:
            stream.cancel()
        await until(lambda: nothing_held(stand))
        await until(lambda: not stand.engines["d0"].core.running)
        await settled(stand)
        assert min(await by_worker(stand)) > 0
        await stand.counted(24, "hexgen2:requests_cancelled_total")
        # Some leave before the owner has even begun to look for a place.
        for _ in range(20):
            streams = [asyncio.create_task(ask(stand, max_tokens=2000)) for _ in range(10)]
            await asyncio.sleep(0.002)
            for stream in streams:
                stream.cancel()
        await until(lambda: nothing_held(stand))
        await until(lambda: holds_of(stand) == 0)


async def test_https_and_a_new_certificate_in_all_workers(tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    async with running({"c0": 1.0}) as stand:
        tls = Tls(*write(tmp_path, old))
        async with Coordinator(stand.coordinator.config, tls=tls, workers=2).running() as door:
            assert door.url.startswith("https://")
            assert {await version(door.url, knowing(old)) for _ in range(6)} == {200}
            write(tmp_path, new)
            door.reload()

            async def all_show_the_new_one() -> bool:
                with contextlib.suppress(aiohttp.ClientError):
                    return {await version(door.url, knowing(new)) for _ in range(6)} == {200}
                return False

            await until_answered(all_show_the_new_one)


def test_a_port_that_is_taken_is_not_shared() -> None:
    sockets = listening("127.0.0.1", 0, 2)
    port = sockets[0][0].getsockname()[1]
    assert {one.getsockname()[1] for group in sockets for one in group} == {port}
    with pytest.raises(OSError, match="in use"):
        listening("127.0.0.1", port, 2)
    for group in sockets:
        for one in group:
            one.close()
