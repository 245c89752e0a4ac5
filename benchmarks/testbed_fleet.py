"""Real engines and a coordinator on a test bed."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console

from hexgen2.coordinator import CoordinatorConfig
from hexgen2.deploy import Deployment, EngineOptions, compile_plan, counted_ports
from hexgen2.deploy.testbed import Bed, BedLauncher
from hexgen2.loadgen.client import Load, measure
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.plan import Plan

FIRST_PORT = 20_000
READY_S = 300.0
COORDINATOR_S = 30.0
TOGETHER = 4
"""Tokens that an engine sends at once, after the first, which leaves more of the processor to the engines. The
times of the first and of the last token stay what they are."""

WARM_UP = 24
"""Requests before the devices get their limits: engines meet each other and compile on the first ones."""


@asynccontextmanager
async def engines(bed: Bed, plan: Plan, folder: Path) -> AsyncIterator[Deployment]:
    """The plan's engines, ready, each in its node; not limited yet."""
    on_bed = plan.model_copy(update={"cluster": bed.cluster})
    options = EngineOptions(extra_arguments=("--no-enable-prefix-caching", "--stream-interval", str(TOGETHER)))
    compiled = compile_plan(on_bed, load_model(plan.model), counted_ports(FIRST_PORT), options)
    deployment = bed.place(compiled)
    async with BedLauncher(folder) as launcher:
        await launcher.start(deployment)
        await launcher.wait_ready(READY_S)
        yield deployment


@asynccontextmanager
async def coordinator(config: CoordinatorConfig, folder: Path) -> AsyncIterator[str]:
    """The URL of a coordinator in a process of its own, as `serve` has it, outside of the nodes."""
    file = folder / "coordinator.json"
    file.write_text(config.model_dump_json())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hexgen2.coordinator", "--config", str(file), "--port", "0"),
        *("--log-level", "error"),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(COORDINATOR_S):
            line = (await process.stderr.readline()).decode()
        if not (found := re.match(r"coordinator on (http\S+)", line)):
            raise RuntimeError(f"the coordinator did not start: {line.strip()}")
        yield found.group(1)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@asynccontextmanager
async def serving(bed: Bed, plan: Plan, folder: Path) -> AsyncIterator[Deployment]:
    """The plan's engines after their first requests, limited to what their devices are."""
    async with engines(bed, plan, folder) as deployment:
        async with coordinator(deployment.coordinator, folder) as url:
            load = Load(url, load_workload("fixed:64/8"), WARM_UP, concurrency=4, seed=99)
            warm = await measure(load, Console(quiet=True))
        if warm["failed"]:
            raise RuntimeError(f"{warm['failed']} requests of the warm-up failed, logs in {folder}")
        bed.limit()
        yield deployment
