"""Emulated engines, coordinators and other servers as processes, for the benchmarks of the serving path."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from hexgen2.coordinator import CoordinatorConfig, EngineEndpoint, Limits, RouteShare, Timeouts
from hexgen2.deploy import free_ports

MODEL = "emulated"
PORTS = free_ports()
START_S = 180.0


@contextlib.asynccontextmanager
async def process(
    *command: str,
    url: str,
    ready: str = "/health",
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> AsyncIterator[psutil.Process]:
    """A server, once its address `ready` answers; it is stopped at the end."""
    output = log.open("wb") if log is not None else None
    started = await asyncio.create_subprocess_exec(
        *command,
        env=env,
        stdout=output or asyncio.subprocess.DEVNULL,
        stderr=output or asyncio.subprocess.DEVNULL,
    )
    try:
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.timeout(START_S):
            while not await _answers(session, url + ready):
                if started.returncode is not None:
                    raise RuntimeError(f"{command[:4]} ended with {started.returncode}; its log: {log}")
                await asyncio.sleep(0.05)
        yield psutil.Process(started.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.terminate()
        try:
            await asyncio.wait_for(started.wait(), 20)
        except TimeoutError:
            started.kill()
            await started.wait()
        if output is not None:
            output.close()


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with session.get(url) as response:
            return response.status == 200
    return False


@contextlib.asynccontextmanager
async def engine(name: str, share: float, max_batch: int, *arguments: str) -> AsyncIterator[EngineEndpoint]:
    """An emulated engine; its role is its name's first letter (p, d or c)."""
    role: Any = {"p": "prefill", "d": "decode", "c": "colocated"}[name[0]]
    port = PORTS("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "hexgen2.emulator", "--role", role, "--port", str(port)]
    command += ["--served-model-name", MODEL, "--max-batch", str(max_batch), *arguments]
    async with process(*command, url=url):
        yield EngineEndpoint(group_id=name, role=role, url=url, share=share, max_batch=max_batch)


def config(
    engines: Sequence[EngineEndpoint],
    routes: Sequence[RouteShare] = (),
    limits: Limits | None = None,
    names: Sequence[str] = (MODEL,),
) -> CoordinatorConfig:
    return CoordinatorConfig(
        served_model_names=tuple(names),
        engines=tuple(engines),
        routes=tuple(routes),
        limits=limits or Limits(),
        timeouts=Timeouts(drain_s=5),
    )


@contextlib.asynccontextmanager
async def coordinator(
    settings: CoordinatorConfig, folder: Path, workers: int = 1
) -> AsyncIterator[tuple[str, psutil.Process]]:
    """A coordinator's address and process, below which its workers are where it has several."""
    settings.save(folder / "coordinator.json")
    port = PORTS("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "hexgen2.coordinator", "--config", str(folder / "coordinator.json")]
    command += ["--port", str(port), "--log-level", "error", "--workers", str(workers)]
    async with process(*command, url=url) as started:
        yield url, started


def cpu_s(measured: psutil.Process, alone: bool = False) -> float:
    """CPU time of a process and (unless `alone`) all below it, so far."""
    total = 0.0
    for one in [measured, *([] if alone else measured.children(recursive=True))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total
