"""A plan as a running service: engines started and watched, the coordinator in front of them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hexgen2.coordinator import ApiKeys, Coordinator, kv_transfer_totals
from hexgen2.deploy import (
    Deployment,
    EngineFailed,
    EngineOptions,
    LocalLauncher,
    Progress,
    check_engine,
    compile_plan,
    free_ports,
    require_free,
)
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console

READY_TIMEOUT_S = 1800.0
"""Loading a large model from a slow disk takes this long; a dead engine ends the wait at once."""


@dataclass(frozen=True)
class Options:
    """How to serve. ``port`` 0: a free one. ``weights``: where the model lies, if not where its name says."""

    host: str = "127.0.0.1"
    port: int = 8000
    run_directory: Path = Path("build/serve")
    api_key_file: Path | None = None
    weights: str | None = None
    source: str = "plan"
    engine: EngineOptions = field(default_factory=EngineOptions)


class Served:
    """A running service."""

    def __init__(
        self, deployment: Deployment, coordinator: Coordinator, launcher: LocalLauncher, console: Console
    ) -> None:
        self._group_of = {process.name: process.group_id for process in deployment.processes}
        self._coordinator = coordinator
        self._launcher = launcher
        self._console = console

    @property
    def url(self) -> str:
        return self._coordinator.url

    async def kv_bytes(self) -> float:
        """Bytes of KV cache that the engines have received since they started."""
        urls = {engine.group_id: engine.url for engine in self._coordinator.config.engines}
        return sum(total.bytes for total in (await kv_transfer_totals(urls)).values())

    async def until_interrupted(self) -> None:
        """Return at SIGINT or SIGTERM; raise EngineFailed when the last complete path has lost an engine.

        An engine that ends while another path is left is reported, and serving goes on without it.
        """
        async with _interrupts() as interrupted:
            while True:
                waiting = asyncio.create_task(interrupted.wait())
                watching = asyncio.create_task(self._launcher.watch())
                try:
                    await asyncio.wait((waiting, watching), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (waiting, watching):
                        task.cancel()
                if interrupted.is_set():
                    return
                failure = EngineFailed.exited(watching.result())
                self._take_out(failure.process)
                if not self._coordinator.fleet.paths_up:
                    raise failure
                self._console.print(f"[bold red]{failure}[/]\nserving goes on without it")

    def _take_out(self, process: str) -> None:
        """End what the group of a dead process was working on; the health watch would see it a second later."""
        fleet = self._coordinator.fleet
        fleet.mark_down(fleet.engines[self._group_of[process]], f"process {process} ended")


@asynccontextmanager
async def serving(plan: Plan, options: Options, console: Console) -> AsyncIterator[Served]:
    """Start the plan's engines and its coordinator; leaving the block drains and ends all of them.

    Raises InputError for a plan that cannot run here, EngineFailed for an engine that does not come up.
    """
    model = load_model(plan.model)
    if options.weights:
        model = model.model_copy(update={"location": options.weights})
    keys = ApiKeys.from_file(options.api_key_file) if options.api_key_file else None
    if options.port:
        require_free(options.host, options.port, "--port")
    deployment = compile_plan(plan, model, free_ports(), options.engine, options.source)
    for vendor in sorted(
        {plan.cluster.gpu_by_id[gpu].type.vendor for group in plan.groups for gpu in group.gpus}
    ):
        check_engine(vendor, transfers=bool(plan.routes))
    for note in deployment.notes:
        console.print(note)
    number = len(deployment.processes)
    console.print(f"starting {number} engine{'s' * (number > 1)}, logs in {options.run_directory}")
    async with AsyncExitStack() as stack:
        launcher = await stack.enter_async_context(LocalLauncher(options.run_directory))
        await launcher.start(deployment)
        await launcher.wait_ready(READY_TIMEOUT_S, lambda progress: _tell(console, progress))
        coordinator = Coordinator(deployment.coordinator, keys)
        await stack.enter_async_context(coordinator.running(options.host, options.port))
        yield Served(deployment, coordinator, launcher, console)


def _tell(console: Console, progress: Progress) -> None:
    state = "is ready" if progress.ready else "is still loading"
    counted = f"{progress.ready_count} of {progress.total}"
    console.print(f"  [{progress.elapsed_s:5.1f} s] {progress.process} {state} ({counted})")


@asynccontextmanager
async def _interrupts() -> AsyncIterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as it always did."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt() -> None:
        event.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, interrupt)
    try:
        yield event
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
