"""A fleet that can be hurt: engines as processes, a coordinator as a process, and outages done to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from hexgen2.coordinator import CoordinatorConfig, EngineEndpoint, Limits, RouteShare, Timeouts
from hexgen2.deploy import free_ports
from tests.chaos.faults import Outage
from tests.waiting import HUNG_S

MODEL = "emulated"
# A frozen engine is noticed after about two seconds, also on a busy machine.
TIMEOUTS = Timeouts(
    connect_s=1.0,
    prefill_s=20,
    first_byte_s=30,
    idle_s=10,
    request_s=290,
    health_interval_s=0.3,
    health_timeout_s=1.0,
    drain_s=5,
)
# The fleets of these tests lose engines all the time, so a request may need many attempts; the more the slower
# the machine is, for engines fall by the clock.
LIMITS = Limits(unhealthy_after=2, max_retries=1000, max_migrations=1000, engine_wait_s=60)


class Engine(Protocol):
    """A process, or a tree of them, that serves one group on a fixed port."""

    def pids(self) -> list[int]:
        """All its processes; none where it is not running."""
        ...

    async def start(self) -> None:
        """Start it, the first time or again."""
        ...


class Nursery:
    """Where emulated engines come from; see tests/chaos/nursery.py."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Nursery:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.nursery"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def bear(self, arguments: Sequence[str]) -> int:
        """A new engine's process id."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._turn:
            self._process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
            return int(await self._process.stdout.readline())


class EmulatedProcess:
    """One emulated engine."""

    def __init__(self, nursery: Nursery, arguments: Sequence[str]) -> None:
        self._nursery = nursery
        self._arguments = arguments
        self._pid: int | None = None

    def pids(self) -> list[int]:
        return [self._pid] if self._pid is not None else []

    async def start(self) -> None:
        self._pid = await self._nursery.bear(self._arguments)


@contextlib.asynccontextmanager
async def emulated(
    prefill: int, decode: int, colocated: int, step_s: float
) -> AsyncIterator[tuple[CoordinatorConfig, dict[str, Engine]]]:
    """That many engines of each role, started; each prefill engine has routes to three decode engines.

    Half of the requests go to colocated engines where there are both kinds.
    """
    counts = {"prefill": prefill, "decode": decode, "colocated": colocated}
    roles: dict[str, Any] = {f"{role[0]}{i}": role for role, count in counts.items() for i in range(count)}
    pairs = [(p, (p + k * max(1, decode // 3)) % decode) for p in range(prefill) for k in range(min(3, decode))]
    split = (0.5 if colocated else 1.0) if prefill else 0.0
    routes = [RouteShare(prefill=f"p{p}", decode=f"d{d}", share=split / len(pairs)) for p, d in pairs]
    ports = free_ports()
    engines: dict[str, Engine] = {}
    endpoints = []
    async with Nursery() as nursery:
        for name, role in roles.items():
            port = ports("127.0.0.1")
            arguments = ["--role", role, "--port", str(port), "--step-base-s", str(step_s)]
            arguments += ["--served-model-name", MODEL, "--max-batch", "64", "--max-model-len", "4096"]
            # The time in which an outage can fall between the legs, or into the transfer.
            arguments += ["--prefill-base-s", "0.02", "--kv-per-token-s", "0.0005"]
            engines[name] = EmulatedProcess(nursery, arguments)
            await engines[name].start()
            share = (1.0 - split) / colocated if role == "colocated" else 0.0
            share += sum(route.share for route in routes if name in (route.prefill, route.decode))
            endpoints.append(
                EngineEndpoint(
                    group_id=name, role=role, url=f"http://127.0.0.1:{port}", share=share, max_batch=64
                )
            )
        yield (
            CoordinatorConfig(
                served_model_names=(MODEL,),
                engines=tuple(endpoints),
                routes=tuple(routes),
                timeouts=TIMEOUTS,
                limits=LIMITS,
            ),
            engines,
        )


class Tormentor:
    """Does outages to engines until the block is left, then makes all of them whole again."""

    def __init__(self, engines: Mapping[str, Engine], schedule: Iterator[Outage]) -> None:
        self._engines = engines
        self._schedule = schedule
        self.done: Counter[str] = Counter()
        self._ends: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Tormentor:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.gather(*self._ends)

    async def _run(self) -> None:
        began = time.monotonic()
        for outage in self._schedule:
            await asyncio.sleep(max(0.0, began + outage.at_s - time.monotonic()))
            self._ends.append(asyncio.create_task(self._do(outage)))

    async def _do(self, outage: Outage) -> None:
        engine = self._engines[outage.group]
        pids = engine.pids()
        _signal(pids, signal.SIGKILL if outage.kind == "kill" else signal.SIGSTOP)
        self.done[outage.kind] += 1
        await asyncio.sleep(outage.for_s)
        if outage.kind == "kill":
            await engine.start()
        else:
            _signal(pids, signal.SIGCONT)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Door:
    """The coordinator's process, seen from outside."""

    def __init__(self, url: str, pid: int, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.pid = pid
        self._http = http

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by name, summed over labels."""
        async with self._http.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        found: defaultdict[str, float] = defaultdict(float)
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] += float(value)
        return dict(found)

    async def health(self) -> dict[str, Any]:
        async with self._http.get(self.url + "/health") as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def wait_whole(self, within_s: float) -> None:
        """Until every engine is up."""
        async with asyncio.timeout(within_s):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    engines = (await self.health())["engines"]
                    if all(engine["up"] for engine in engines.values()):
                        return
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def door(config: CoordinatorConfig, folder: Path, workers: int = 1) -> AsyncIterator[Door]:
    """The coordinator as a process, its log in the folder, once it answers; it must end well on SIGTERM."""
    config.save(folder / "coordinator.json")
    port = free_ports()("127.0.0.1")
    with (folder / "coordinator.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hexgen2.coordinator", "--config", str(folder / "coordinator.json")),
            *("--port", str(port), "--log-level", "info", "--workers", str(workers)),
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession() as http:
            found = Door(f"http://127.0.0.1:{port}", process.pid, http)
            async with asyncio.timeout(HUNG_S):
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        await found.health()
                        break
                    await asyncio.sleep(0.05)
            yield found
        assert process.returncode is None, "the coordinator died"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), HUNG_S)
        except TimeoutError:
            process.kill()
            raise
