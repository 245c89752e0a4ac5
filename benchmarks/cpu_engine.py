"""What the settings and tunings of CPU engines are worth: start-up, memory, latency, KV transfer, idle CPU.

    python benchmarks/cpu_engine.py [--only TEXT] [--requests N]

For each case it starts a prefill and a decode engine of the shipped model side by side, sends requests over
the two legs one after the other, looks at the idle engines for some seconds, and stops them. Needs the `cpu`
extra. The whole takes about ten minutes on two quiet cores; the first line of the output says how quiet they
were. `CPU s` is what both engines together used until they were ready; unlike `ready s` it hardly depends on
what else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from hexgen2.deploy import (
    Deployment,
    EngineFailed,
    EngineOptions,
    LocalLauncher,
    ProcessSpec,
    compile_plan,
    free_ports,
    guard,
)
from hexgen2.specs import Group, Plan, Route, Stage, parse_cluster
from hexgen2.specs.catalog import load_model
from hexgen2.specs.plan import Bottleneck, Objective

TOKENS = 24
IDLE_S = 5.0
TICKS = os.sysconf("SC_CLK_TCK")
COMPILED = ("--compilation-config", '{"mode":1,"backend":"eager"}')
"""How a pipelined CPU engine starts without our tuning: eager mode lacks the buffer between its stages."""

NO_REMOTE = {"do_remote_decode": True, "do_remote_prefill": False} | dict.fromkeys(
    ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
)

Change = Callable[[ProcessSpec], ProcessSpec]


@dataclass(frozen=True)
class Case:
    """A layout of the prefill group (stages as (TP, layers)), and how its engines differ from `deploy`'s."""

    name: str
    stages: tuple[tuple[int, int], ...]
    change: Change


@dataclass(frozen=True)
class Figures:
    """One row of the table."""

    start_s: float
    start_cpu_s: float
    prefill_mb: float
    decode_mb: float
    first_s: float
    median_ms: float
    transfer_ms: float
    idle_percent: float


def tuned(names: str, *, uni: bool = True, compiler: bool = False, compiled: bool = False) -> Change:
    """Engines with some tunings alone, with or without the uni executor, torch.compile and a compiled
    model."""

    def change(spec: ProcessSpec) -> ProcessSpec:
        env = {**spec.env, "HEXGEN2_VLLM_TUNING": names}
        argv = list(spec.argv)
        if compiler:
            del env["TORCH_COMPILE_DISABLE"]
        if not uni and "--distributed-executor-backend" in argv:
            place = argv.index("--distributed-executor-backend")
            del argv[place : place + 2]
        if compiled and spec.role == "prefill":
            argv.remove("--enforce-eager")
            argv += COMPILED
        return spec.model_copy(update={"env": env, "argv": tuple(argv)})

    return change


ALL = "cpu"
NOTHING = ""
TP1, TP2, PP2 = ((1, 8),), ((2, 8),), ((1, 3), (1, 5))
CASES = (
    Case("TP1 -> TP1, as vLLM comes", TP1, tuned(NOTHING, uni=False, compiler=True)),
    Case("TP1 -> TP1, uni executor", TP1, tuned(NOTHING)),
    Case("TP1 -> TP1, uni executor, fork", TP1, tuned("fork")),
    Case("TP1 -> TP1, uni executor, fork, NIXL pause", TP1, tuned("fork,nixl-progress")),
    Case("TP1 -> TP1, deploy's", TP1, tuned(ALL)),
    Case("TP2 -> TP1, as vLLM comes", TP2, tuned(NOTHING, uni=False, compiler=True)),
    Case("TP2 -> TP1, deploy's but torch.compile", TP2, tuned(ALL, compiler=True)),
    Case("TP2 -> TP1, deploy's but idle-wait", TP2, tuned("fork,nixl-progress,nixl-affinity")),
    Case("TP2 -> TP1, deploy's", TP2, tuned(ALL)),
    Case("PP2 -> TP1, as vLLM comes", PP2, tuned(NOTHING, uni=False, compiler=True, compiled=True)),
    Case("PP2 -> TP1, deploy's", PP2, tuned(ALL)),
)


def pair(stages: Sequence[tuple[int, int]]) -> Plan:
    """A prefill group of those stages and a decode group of one device, on CPU devices of this machine."""
    count = sum(tp for tp, _ in stages)
    devices = parse_cluster(
        {
            "name": "pair",
            "nodes": [
                {"name": "p", "gpu": "cpu-1c", "count": count},
                {"name": "d", "gpu": "cpu-1c", "count": 1},
            ],
            "network": {"default": {"gbps": 10}},
        },
        "benchmark",
    )
    built, first, layer = [], 0, 0
    for tp, layers in stages:
        gpus = tuple(f"p/{first + i}" for i in range(tp))
        built.append(Stage(gpus=gpus, tp=tp, first_layer=layer, layers=layers))
        first, layer = first + tp, layer + layers
    common: dict[str, Any] = {"share": 1.0, "price_per_hour": 0.0, "capacity_rps": 1.0, "max_batch": 16}
    whole = (Stage(gpus=("d/0",), tp=1, first_layer=0, layers=layer),)
    return Plan(
        cluster=devices,
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
            Group(id="p0", role="prefill", stages=tuple(built), **common),
            Group(id="d0", role="decode", stages=whole, **common),
        ),
        routes=(Route(source="p0", target="d0", share=1.0, rps=1.0, capacity_rps=1.0),),
        bottleneck=Bottleneck(elements=(), text=""),
    )


def memory_mb(pid: int) -> float:
    """Memory of a process tree in MB, shared pages counted once (PSS)."""
    total = 0
    for member in guard.descendants(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total / 1e6


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds that the process trees have used."""
    ticks = 0
    for pid in pids:
        for member in guard.descendants(pid):
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])  # own user, system; reaped children's
    return ticks / TICKS


class Client:
    """Sends requests over the two legs, as a coordinator would."""

    def __init__(self, http: aiohttp.ClientSession, deployment: Deployment) -> None:
        self._http = http
        self._urls = {engine.group_id: engine.url for engine in deployment.coordinator.engines}
        self._sent = 0

    async def two_legs(self, prompt: str) -> float:
        """Seconds from sending leg 1 to the whole answer of leg 2."""
        self._sent += 1
        body = {
            "model": "tiny-llama",
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        begun = time.perf_counter()
        first = await self._post("p0", {**body, "max_tokens": 1, "kv_transfer_params": NO_REMOTE})
        answer = await self._post("d0", {**body, "kv_transfer_params": first["kv_transfer_params"]})
        assert answer["usage"]["completion_tokens"] == TOKENS, answer
        return time.perf_counter() - begun

    async def transfer_ms(self) -> float:
        """Mean milliseconds of a KV transfer, as NIXL saw it (the side that moves the data counts it)."""
        sums = {"sum": 0.0, "count": 0.0}
        for url in self._urls.values():
            async with self._http.get(f"{url}/metrics") as response:
                for line in (await response.text()).splitlines():
                    for kind in sums:
                        if line.startswith(f"vllm:nixl_xfer_time_seconds_{kind}{{"):
                            sums[kind] += float(line.rsplit(" ", 1)[1])
        return 1e3 * sums["sum"] / sums["count"]

    async def _post(self, group: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"X-Request-Id": f"benchmark-{self._sent}"}
        url = f"{self._urls[group]}/v1/completions"
        async with self._http.post(url, json=body, headers=headers) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer


async def measure(case: Case, requests: int, run_dir: Path) -> Figures:
    compiled = compile_plan(pair(case.stages), load_model("tiny-llama"), free_ports(), EngineOptions())
    deployment = compiled.model_copy(
        update={"processes": tuple(case.change(spec) for spec in compiled.processes)}
    )
    async with LocalLauncher(run_dir) as launcher:
        begun = time.perf_counter()
        await launcher.start(deployment)
        await launcher.wait_ready(600)
        start_s = time.perf_counter() - begun
        work = asyncio.create_task(observe(launcher, deployment, requests, start_s))
        death = asyncio.create_task(launcher.watch())
        await asyncio.wait((work, death), return_when=asyncio.FIRST_COMPLETED)
        if work.done() and work.exception():
            await asyncio.wait((death,), timeout=5)  # a lost connection may be the first sign of a death
        if death.done():
            work.cancel()
            raise EngineFailed.exited(death.result())
        death.cancel()
        return work.result()


async def observe(launcher: LocalLauncher, deployment: Deployment, requests: int, start_s: float) -> Figures:
    """Use running engines and watch them."""
    pids = launcher.pids()
    start_cpu_s = cpu_s(list(pids.values()))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as http:
        client = Client(http, deployment)
        # Prompts differ from their first token on: nothing comes from a prefix cache.
        times = [await client.two_legs(f"{n} is the number of this prompt. " * 10) for n in range(requests + 1)]
        await asyncio.sleep(2.0)  # readers spin for a second after their last message
        before = cpu_s(list(pids.values()))
        await asyncio.sleep(IDLE_S)
        idle = (cpu_s(list(pids.values())) - before) / IDLE_S
        return Figures(
            start_s=start_s,
            start_cpu_s=start_cpu_s,
            prefill_mb=memory_mb(pids["p0"]),
            decode_mb=memory_mb(pids["d0"]),
            first_s=times[0],
            median_ms=1e3 * statistics.median(times[1:]),
            transfer_ms=await client.transfer_ms(),
            idle_percent=100 * idle,
        )


COLUMNS = (
    ("ready s", "{0.start_s:.1f}"),
    ("CPU s", "{0.start_cpu_s:.1f}"),
    ("prefill MB", "{0.prefill_mb:.0f}"),
    ("decode MB", "{0.decode_mb:.0f}"),
    ("first s", "{0.first_s:.2f}"),
    ("then ms", "{0.median_ms:.0f}"),
    ("transfer ms", "{0.transfer_ms:.1f}"),
    ("idle CPU %", "{0.idle_percent:.0f}"),
)


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="run the cases whose name has this in it")
    parser.add_argument("--requests", type=int, default=20, help="requests after the first (default 20)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    arguments = parser.parse_args()
    rows: dict[str, Figures] = {}
    if not arguments.json:
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the first case")
        print_row("case", *(name for name, _ in COLUMNS))
        print_row("---", *("---" for _ in COLUMNS))
    for case in CASES:
        if arguments.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = rows[case.name] = asyncio.run(measure(case, arguments.requests, Path(folder)))
        if not arguments.json:
            print_row(case.name, *(cell.format(row) for _, cell in COLUMNS))
    if arguments.json:
        print(json.dumps({name: vars(row) for name, row in rows.items()}, indent=2))


if __name__ == "__main__":
    main()
