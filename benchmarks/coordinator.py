"""What the coordinator costs: latency added to each request, and CPU time per request and token.

Emulated engines and the coordinator run as processes of their own; the same load goes once straight to an
engine and once through the coordinator over colocated engines (one leg), and, with --disaggregated, through
prefill and decode engines (two legs: the prefill is then part of the difference, so only the CPU figures
compare).

    python benchmarks/coordinator.py --concurrency 200 --requests 1000 --tokens 32
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from hexgen2.coordinator import CoordinatorConfig, EngineEndpoint, RouteShare

MODEL = "emulated"


@dataclass
class Measured:
    """One load's figures; times in seconds."""

    ttft: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    failed: int = 0
    wall: float = 0.0
    cpu: float = 0.0  # of the coordinator's process, 0 where it had no part

    def summary(self, tokens: int) -> dict[str, Any]:
        done = len(self.e2e)
        return {
            "requests": done,
            "failed": self.failed,
            "requests_per_s": round(done / self.wall, 1),
            "ttft_ms": {"p50": _ms(self.ttft, 50), "p99": _ms(self.ttft, 99)},
            "e2e_ms": {"p50": _ms(self.e2e, 50), "p99": _ms(self.e2e, 99)},
            "cpu_ms_per_request": round(1e3 * self.cpu / done, 3) if self.cpu else None,
            "cpu_us_per_token": round(1e6 * self.cpu / (done * tokens), 2) if self.cpu else None,
            "requests_per_core_s": round(done / self.cpu, 1) if self.cpu else None,
        }


def _ms(values: list[float], percentile: int) -> float:
    return round(1e3 * statistics.quantiles(values, n=100, method="inclusive")[percentile - 1], 2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def _process(*arguments: str, url: str) -> AsyncIterator[psutil.Process]:
    """A module of ours as a process, once its /health answers."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url + "/health") as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.05)
        yield psutil.Process(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _load(url: str, arguments: argparse.Namespace, process: psutil.Process | None) -> Measured:
    """`requests` streams, `concurrency` at a time."""
    measured = Measured()
    numbers = iter(range(arguments.requests))
    prompt = list(range(1, arguments.prompt_tokens + 1))

    async def worker(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            body = {
                "model": MODEL,
                "prompt": [number % 30_000, *prompt],
                "max_tokens": arguments.tokens,
                "stream": True,
            }
            began = time.perf_counter()
            first, last = 0.0, b""
            async with session.post(url + "/v1/completions", json=body) as response:
                async for data in response.content.iter_any():
                    first = first or time.perf_counter()
                    last = data
            if response.status != 200 or not last.endswith(b"data: [DONE]\n\n"):
                measured.failed += 1
                continue
            measured.ttft.append(first - began)
            measured.e2e.append(time.perf_counter() - began)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        cpu = _cpu_s(process)
        began = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(arguments.concurrency)))
        measured.wall = time.perf_counter() - began
        measured.cpu = _cpu_s(process) - cpu
    return measured


def _cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


async def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ["p0", "d0", "d1"] if arguments.disaggregated else ["c0", "c1"]
    roles = {"p": "prefill", "d": "decode", "c": "colocated"}
    async with contextlib.AsyncExitStack() as stack:
        endpoints = []
        for name in names:
            port = _free_port()
            url = f"http://127.0.0.1:{port}"
            role: Any = roles[name[0]]
            step = str(arguments.step_s)
            await stack.enter_async_context(
                _process(
                    "hexgen2.emulator", "--role", role, "--port", str(port), "--step-base-s", step, url=url
                )
            )
            share = 1.0 if name == "p0" else 0.5
            endpoints.append(EngineEndpoint(group_id=name, role=role, url=url, share=share, max_batch=1024))
        routes = tuple(RouteShare(prefill="p0", decode=d, share=0.5) for d in ("d0", "d1"))
        config = CoordinatorConfig(
            served_model_names=(MODEL,),
            engines=tuple(endpoints),
            routes=routes if arguments.disaggregated else (),
        )
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config.save(Path(folder) / "config.json")
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        front = await stack.enter_async_context(
            _process(
                *("hexgen2.coordinator", "--config", str(Path(folder) / "config.json")),
                *("--port", str(port), "--log-level", "error"),
                url=url,
            )
        )
        direct = await _load(endpoints[-1].url, arguments, None)
        through = await _load(url, arguments, front)
        memory = front.memory_info().rss
    straight, routed = direct.summary(arguments.tokens), through.summary(arguments.tokens)
    added = {
        f"{what}_{at}_ms": round(routed[f"{what}_ms"][at] - straight[f"{what}_ms"][at], 2)
        for what in ("ttft", "e2e")
        for at in ("p50", "p99")
    }
    return {
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "direct": straight,
        "coordinator": routed,
        "added": added,
        "coordinator_rss_mib": round(memory / 2**20, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--step-s", type=float, default=0.03, help="time of the emulated engines' decode step")
    parser.add_argument("--disaggregated", action="store_true", help="one prefill and two decode engines")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    report = json.dumps(asyncio.run(_run(arguments)), indent=2)
    print(report)
    if arguments.output:
        arguments.output.write_text(report + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
