"""What a front door costs: latency added to each stream, CPU per request, and output tokens/s.

The same load of streams goes to one front door after another, all before the same one prefill and two decode
engines:

- direct: this client sends the two legs itself; what the others add is counted from here;
- coordinator: ours; with `--workers` also with that many worker processes;
- vllm-router, where `--vllm-router` names its program (`pip install vllm-router`, in its own environment);
- toy-proxy, where `--toy-proxy` names vLLM's example proxy (tests/v1/kv_connector/nixl_integration/
  toy_proxy_server.py in vLLM's repository) and `--toy-python` an interpreter with fastapi, httpx and uvicorn.

By default the engines are paced stand-ins (pacer.py), whose first token comes at an exact time; with `--real`
they are vLLM engines with the shipped model on CPUs. Runs are taken in turns, `--rounds` of each, and pooled.

    python benchmarks/coordinator.py --concurrency 200 --requests 1000
    python benchmarks/coordinator.py --real --concurrency 8 --requests 64 --tokens 64
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from processes import MODEL, PORTS, config, coordinator, cpu_s, process

from hexgen2.coordinator import CoordinatorConfig, EngineEndpoint, RouteShare
from hexgen2.deploy import EngineOptions, LocalLauncher, compile_plan, free_ports
from hexgen2.specs import Group, Plan, Role, Route, Stage, parse_cluster
from hexgen2.specs.catalog import load_model
from hexgen2.specs.plan import Bottleneck, Objective

NO_REMOTE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass
class Measured:
    """One front door's figures; times in seconds."""

    ttft: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    failed: int = 0
    wall: float = 0.0
    cpu: float = 0.0  # of the front door's processes; 0 where there is none
    owner_cpu: float = 0.0  # of the first of them
    rss: int = 0

    def summary(self, tokens: int) -> dict[str, Any]:
        done = len(self.e2e)
        return {
            "requests": done,
            "failed": self.failed,
            "output_tokens_per_s": round(done * tokens / self.wall, 1),
            "ttft_ms": {"p50": _ms(self.ttft, 50), "p99": _ms(self.ttft, 99)},
            "e2e_ms": {"p50": _ms(self.e2e, 50), "p99": _ms(self.e2e, 99)},
            "cpu_ms_per_request": round(1e3 * self.cpu / done, 3) if self.cpu else None,
            "owner_cpu_ms_per_request": round(1e3 * self.owner_cpu / done, 3) if self.cpu else None,
            "requests_per_core_s": round(done / self.cpu, 1) if self.cpu else None,
            "rss_mib": round(self.rss / 2**20, 1) if self.rss else None,
        }


def _ms(values: Sequence[float], percentile: int) -> float | None:
    if len(values) < 2:
        return None
    return round(1e3 * statistics.quantiles(values, n=100, method="inclusive")[percentile - 1], 2)


@dataclass(frozen=True)
class Front:
    """A front door: where it listens and its process, or the engines themselves."""

    name: str
    url: str
    process: psutil.Process | None = None


@dataclass(frozen=True)
class Engines:
    config: CoordinatorConfig
    model: str

    def urls(self, role: Role) -> list[str]:
        return [engine.url for engine in self.config.engines if engine.role == role]


async def load(front: Front, engines: Engines, arguments: argparse.Namespace, into: Measured) -> None:
    """`requests` streams, `concurrency` at a time; the first ones begin spread over one stream's time."""
    numbers = iter(range(arguments.requests))
    words = list(range(3, arguments.prompt_tokens + 2))
    prefill, decode = itertools.cycle(engines.urls("prefill")), itertools.cycle(engines.urls("decode"))

    async def direct(http: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
        """Leg 1 by this client: where leg 2 goes, its body and the request's id."""
        id_ = uuid.uuid4().hex
        leg = body | {"stream": False, "max_tokens": 1, "kv_transfer_params": NO_REMOTE}
        url = next(prefill) + "/v1/completions"
        async with http.post(url, json=leg, headers={"X-Request-Id": id_}) as response:
            kv = (await response.json())["kv_transfer_params"]
        return next(decode), body | {"kv_transfer_params": kv}, id_

    async def one(http: aiohttp.ClientSession, number: int) -> None:
        body: dict[str, Any] = {"model": engines.model, "prompt": [3 + number % 2000, *words]}
        body |= {"max_tokens": arguments.tokens, "stream": True, "temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        url, id_ = front.url, uuid.uuid4().hex
        if front.name == "direct":
            url, body, id_ = await direct(http, body)
        first, last, tail = 0.0, 0.0, b""
        async with http.post(url + "/v1/completions", json=body, headers={"X-Request-Id": id_}) as response:
            async for data in response.content.iter_any():
                last = time.perf_counter()
                first = first or last
                tail = tail[-64:] + data
        if response.status != 200 or not tail.rstrip().endswith(b"data: [DONE]"):
            into.failed += 1
            return
        into.ttft.append(first - began)
        into.e2e.append(last - began)

    async def worker(http: aiohttp.ClientSession, after_s: float) -> None:
        await asyncio.sleep(after_s)
        for number in numbers:
            try:
                await one(http, number)
            except (aiohttp.ClientError, LookupError, TypeError):
                into.failed += 1

    # The stand-ins' pace is known; real engines are as quick as they are.
    spread_s = 0.0 if arguments.real else 0.02 + arguments.tokens * arguments.step_s
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        used = cpu_s(front.process) if front.process else 0.0
        owner_used = cpu_s(front.process, alone=True) if front.process else 0.0
        began = time.perf_counter()
        share = spread_s / arguments.concurrency
        await asyncio.gather(*(worker(http, share * place) for place in range(arguments.concurrency)))
        into.wall += time.perf_counter() - began
    if front.process is not None:
        into.cpu += cpu_s(front.process) - used
        into.owner_cpu += cpu_s(front.process, alone=True) - owner_used
        tree = [front.process, *front.process.children(recursive=True)]
        into.rss = max(into.rss, sum(one.memory_info().rss for one in tree))


@contextlib.asynccontextmanager
async def paced(arguments: argparse.Namespace) -> AsyncIterator[Engines]:
    """One prefill and two decode stand-ins."""
    async with contextlib.AsyncExitStack() as stack:
        endpoints = []
        roles: list[tuple[str, Role]] = [("p0", "prefill"), ("d0", "decode"), ("d1", "decode")]
        for name, role in roles:
            port = PORTS("127.0.0.1")
            url = f"http://127.0.0.1:{port}"
            script = str(Path(__file__).with_name("pacer.py"))
            command = [sys.executable, script, "--port", str(port), "--step-s", str(arguments.step_s)]
            await stack.enter_async_context(process(*command, url=url))
            share = 1.0 if role == "prefill" else 0.5
            endpoints.append(EngineEndpoint(group_id=name, role=role, url=url, share=share, max_batch=1024))
        yield Engines(config(endpoints, _routes()), MODEL)


@contextlib.asynccontextmanager
async def real(folder: Path) -> AsyncIterator[Engines]:
    """One prefill and two decode vLLM engines with the shipped model, a core each."""
    nodes = [{"name": name, "gpu": "cpu-1c", "count": 1} for name in "abc"]
    cluster = parse_cluster(
        {"name": "bench", "nodes": nodes, "network": {"default": {"gbps": 10}}}, "benchmark"
    )
    model = load_model("tiny-llama")

    def group(name: str, role: Role, gpu: str, share: float) -> Group:
        stage = Stage(gpus=(gpu,), tp=1, first_layer=0, layers=model.layers)
        return Group(
            id=name, role=role, share=share, price_per_hour=0.0, capacity_rps=1.0, max_batch=64, stages=(stage,)
        )

    plan = Plan(
        cluster=cluster,
        model="tiny-llama",
        workload="none",
        engine="vllm",
        solver="by hand",
        seed=0,
        objective=Objective(name="throughput", value=1.0, unit="requests/s"),
        throughput_rps=1.0,
        output_tokens_per_s=1.0,
        price_per_hour=0.0,
        wall_s=0.0,
        groups=(
            group("p0", "prefill", "a/0", 1.0),
            group("d0", "decode", "b/0", 0.5),
            group("d1", "decode", "c/0", 0.5),
        ),
        routes=tuple(
            Route(source="p0", target=to, share=0.5, rps=0.5, capacity_rps=1.0) for to in ("d0", "d1")
        ),
        bottleneck=Bottleneck(elements=(), text=""),
    )
    deployment = compile_plan(plan, model, free_ports(), EngineOptions())
    async with LocalLauncher(folder / "engines") as launcher:
        await launcher.start(deployment)
        await launcher.wait_ready(240)
        yield Engines(deployment.coordinator, "tiny-llama")


def _routes() -> list[RouteShare]:
    return [RouteShare(prefill="p0", decode=to, share=0.5) for to in ("d0", "d1")]


@contextlib.asynccontextmanager
async def fronts(engines: Engines, arguments: argparse.Namespace, folder: Path) -> AsyncIterator[list[Front]]:
    """Every front door that is to be had, running."""
    prefill, decode = engines.urls("prefill"), engines.urls("decode")
    async with contextlib.AsyncExitStack() as stack:
        found = [Front("direct", "")]
        url, started = await stack.enter_async_context(coordinator(engines.config, folder))
        found.append(Front("coordinator", url, started))
        if arguments.workers > 1:
            several = coordinator(engines.config, folder, arguments.workers)
            url, started = await stack.enter_async_context(several)
            found.append(Front(f"coordinator-{arguments.workers}", url, started))
        # Other people's programs see neither our packages nor our settings.
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        if arguments.vllm_router:
            port = PORTS("127.0.0.1")
            command = [arguments.vllm_router, "--vllm-pd-disaggregation", "--policy", "round_robin"]
            command += [part for url in prefill for part in ("--prefill", url)]
            command += [part for url in decode for part in ("--decode", url)]
            command += [
                "--port",
                str(port),
                "--prometheus-port",
                str(PORTS("127.0.0.1")),
                "--log-level",
                "error",
            ]
            url, log = f"http://127.0.0.1:{port}", folder / "vllm-router.log"
            started = await stack.enter_async_context(process(*command, url=url, env=env, log=log))
            found.append(Front("vllm-router", url, started))
        if arguments.toy_proxy:
            port = PORTS("127.0.0.1")
            command = [arguments.toy_python, arguments.toy_proxy, "--port", str(port)]
            for flag, urls in (("prefiller", prefill), ("decoder", decode)):
                command += [f"--{flag}-hosts", *["127.0.0.1"] * len(urls)]
                command += [f"--{flag}-ports", *(str(urlsplit(url).port) for url in urls)]
            url, log = f"http://127.0.0.1:{port}", folder / "toy-proxy.log"
            started = await stack.enter_async_context(
                process(*command, url=url, env=env, log=log, ready="/healthcheck")
            )
            found.append(Front("toy-proxy", url, started))
        yield found


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with contextlib.AsyncExitStack() as stack:
            engines = await stack.enter_async_context(real(folder) if arguments.real else paced(arguments))
            doors = await stack.enter_async_context(fronts(engines, arguments, folder))
            measured = {front.name: Measured() for front in doors}
            warm_up = argparse.Namespace(**vars(arguments) | {"requests": 16, "concurrency": 4, "tokens": 4})
            for front in doors:
                await load(front, engines, warm_up, Measured())
            for _ in range(arguments.rounds):
                for front in doors:
                    await load(front, engines, arguments, measured[front.name])
    shown = {name: figures.summary(arguments.tokens) for name, figures in measured.items()}
    straight, ours = shown["direct"], shown["coordinator"]
    added = {
        name: {
            f"{what}_{at}_ms": _less(figures[f"{what}_ms"][at], straight[f"{what}_ms"][at])
            for what in ("ttft", "e2e")
            for at in ("p50", "p99")
        }
        for name, figures in shown.items()
        if name != "direct"
    }
    ratios = {
        name: {
            key: round(ours[key] / figures[key], 3)
            for key in ("output_tokens_per_s", "requests_per_core_s")
            if figures[key]
        }
        for name, figures in shown.items()
        if name not in ("direct", "coordinator")
    }
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    return {"settings": settings, "fronts": shown, "added": added, "coordinator_over": ratios}


def _less(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else round(value - base, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000, help="in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--step-s", type=float, default=0.1, help="between two tokens of a stand-in's stream")
    parser.add_argument("--workers", type=int, default=1, help="also a coordinator with so many")
    parser.add_argument("--real", action="store_true", help="vLLM engines on CPUs instead of stand-ins")
    parser.add_argument("--vllm-router", metavar="PROGRAM")
    parser.add_argument("--toy-proxy", metavar="SCRIPT")
    parser.add_argument("--toy-python", metavar="PROGRAM", default=sys.executable)
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    report = json.dumps(uvloop.run(run(arguments)), indent=2)
    print(report)
    if arguments.output:
        arguments.output.write_text(report + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
