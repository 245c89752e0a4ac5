"""A plan as a running service: engines started and watched, the coordinator in front of them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hexgen2.cli.platform import Emulation, LauncherName, Where, platform
from hexgen2.cli.replanning import FixedEngines, controller_for
from hexgen2.controller import Engines, Mode
from hexgen2.coordinator import ApiKeys, Coordinator, Tls, Tracing, kv_transfer_totals
from hexgen2.deploy import (
    EngineFailed,
    EngineOptions,
    GroupEvent,
    Launcher,
    Progress,
    RestartPolicy,
    RunningGroups,
    Supervisor,
    connector_of,
    require_free,
    require_own,
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
    workers: int = 1
    overlap_kv: bool = False
    run_directory: Path = Path("build/serve")
    api_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    otlp_traces_endpoint: str | None = None
    weights: str | None = None
    source: str = "plan"
    engine: EngineOptions = field(default_factory=EngineOptions)
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    emulation: Emulation | None = None
    replan: Mode | None = None
    launcher: LauncherName = "local"
    ray_address: str | None = None

    @property
    def where(self) -> Where:
        return Where(
            self.launcher, self.ray_address, self.run_directory, self.source, self.engine, self.emulation
        )


class Served:
    """A running service."""

    def __init__(self, coordinator: Coordinator, console: Console) -> None:
        self.coordinator = coordinator
        self._console = console
        self._given_up: set[str] = set()
        self.returning: set[str] = set()
        """Groups that are being started again."""
        self._lost: asyncio.Future[EngineFailed] = asyncio.get_running_loop().create_future()

    @property
    def url(self) -> str:
        return self.coordinator.url

    async def kv_bytes(self) -> float:
        """Bytes of KV cache that the engines have received since they started."""
        urls = {engine.group_id: engine.url for engine in self.coordinator.config.engines}
        return sum(total.bytes for total in (await kv_transfer_totals(urls)).values())

    async def until_interrupted(self) -> None:
        """Return at SIGINT or SIGTERM; raise EngineFailed when no complete path is left or will come back.

        Engines that end are started again meanwhile, and each event is reported.
        """
        async with _interrupts(self.coordinator.reload) as interrupted:
            waiting = asyncio.create_task(interrupted.wait())
            try:
                await asyncio.wait((waiting, self._lost), return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if not interrupted.is_set():
                raise self._lost.result()

    def note(self, event: GroupEvent) -> None:
        """Take what the supervisor tells of to the coordinator and to the user."""
        coordinator, group = self.coordinator, event.group
        if event.kind in ("down", "starting"):
            self.returning.add(group)
        else:
            self.returning.discard(group)
        if event.kind == "down":
            # Ends what the group was working on; the health watch would see it a second later.
            coordinator.engine_ended(group)
            self._alarm(str(event.failure))
        elif event.kind == "absent":
            self._console.print(f"{group} waits for its node's return")
        elif event.kind == "starting":
            coordinator.engine_restarts(group)
            self._console.print(f"starting {group} again (attempt {event.attempt})")
        elif event.kind == "up":
            self._console.print(f"{group} is ready again")
        else:
            self._give_up(event)

    def _alarm(self, text: str) -> None:
        # Lines of an engine's log may have brackets, which must not be taken for markup.
        self._console.print(text, style="bold red", markup=False)

    def lose(self, failure: EngineFailed) -> None:
        """Nothing is left to serve with."""
        if not self._lost.done():
            self._lost.set_result(failure)

    def supervisor_ended(self, task: asyncio.Task[None]) -> None:
        """A mistake in the supervisor ends the service: without it a dead engine would stay unnoticed."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._lost.done():
            self._lost.set_exception(error)

    def _give_up(self, event: GroupEvent) -> None:
        self._given_up.add(event.group)
        self.coordinator.engine_given_up(event.group)
        tries = event.attempt
        told = f"{event.group} stays down: " + (
            f"it was started again {tries} time{'s' * (tries > 1)} and did not last"
            if tries
            else "engines are not to be started again"
        )
        paths = self.coordinator.fleet.planned.paths
        if any(self._given_up.isdisjoint(path.groups) for path in paths):
            self._alarm(told)
            self._console.print("serving goes on without it")
        elif not self._lost.done():
            self._alarm(told)
            assert event.failure is not None, "a group is given up after a failure"
            self.lose(event.failure)


@asynccontextmanager
async def serving(plan: Plan, options: Options, console: Console) -> AsyncIterator[Served]:
    """Start the plan's engines and its coordinator; leaving the block drains and ends all of them.

    Raises InputError for a plan that cannot run here, EngineFailed for an engine that does not come up,
    WorkersFailed for a worker process that does not.
    """
    model = load_model(plan.model)
    if options.weights:
        model = model.model_copy(update={"location": _location(options.weights)})
    keys = ApiKeys.from_file(options.api_key_file) if options.api_key_file else None
    tls = Tls.from_options(options.tls_cert, options.tls_key)
    tracing = Tracing.to_endpoint(options.otlp_traces_endpoint)
    require_own(options.host, "--host")
    if options.port:
        require_free(options.host, options.port, "--port")
    async with AsyncExitStack() as stack:
        on = await stack.enter_async_context(platform(plan, model, options.where))
        for note in on.deployment.notes:
            console.print(note)
        number = len(on.deployment.processes)
        console.print(f"starting {number} engine{'s' * (number > 1)}, logs in {options.run_directory}")
        began = time.monotonic()
        await on.launcher.start(on.deployment)
        await on.launcher.wait_ready(READY_TIMEOUT_S, lambda progress: _tell(console, progress))
        started_in_s = time.monotonic() - began
        config = on.deployment.coordinator.model_copy(update={"overlap_kv": options.overlap_kv})
        coordinator = Coordinator(config, keys, tls, tracing, options.workers)
        await stack.enter_async_context(coordinator.running(options.host, options.port))
        served = Served(coordinator, console)
        if on.watch is not None:
            await stack.enter_async_context(_in_background(on.watch.run(), served))
        if on.again is None:
            await stack.enter_async_context(_in_background(_watch_fleet(on.launcher, served), served))
            engines: Engines = FixedEngines(on.deployment)
        else:
            groups = [engine.group_id for engine in on.deployment.coordinator.engines]
            supervisor = Supervisor(on.launcher, groups, served.note, options.restarts, coordinator.silent_for)
            await stack.enter_async_context(_in_background(supervisor.run(), served))
            engines = RunningGroups(on.launcher, supervisor, on.deployment, on.again, READY_TIMEOUT_S)
        in_place = True
        if options.emulation is None:
            in_place = connector_of(plan, options.engine, options.source) == "hexgen"
        elif options.emulation.profiles:  # the engines' times are theirs
            plan = plan.model_copy(update={"profiles": options.emulation.profiles})
        coordinator.live.plan = lambda: plan
        if options.replan is not None:
            controller = controller_for(
                plan,
                coordinator,
                engines,
                mode=options.replan,
                in_place=in_place,
                started_in_s=started_in_s,
                run_directory=options.run_directory,
                returning=lambda: served.returning,
                alive=on.alive,
                console=console,
            )
            coordinator.live.plan = lambda: controller.plan
            await stack.enter_async_context(_in_background(controller.run(), served))
        yield served


def _location(weights: str) -> str:
    """Where the weights lie for engines, which may run in another folder; a hub's name as it is."""
    return str(Path(weights).resolve()) if Path(weights).is_dir() else weights


@asynccontextmanager
async def _in_background(watching: Coroutine[Any, Any, None], served: Served) -> AsyncIterator[None]:
    task = asyncio.create_task(watching, name="background")
    task.add_done_callback(served.supervisor_ended)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _watch_fleet(launcher: Launcher, served: Served) -> None:
    """Emulated engines are one process: when it ends, all is lost."""
    served.lose(EngineFailed.exited(await launcher.watch()))


def _tell(console: Console, progress: Progress) -> None:
    state = "is ready" if progress.ready else "is still loading"
    counted = f"{progress.ready_count} of {progress.total}"
    console.print(f"  [{progress.elapsed_s:5.1f} s] {progress.process} {state} ({counted})")


@asynccontextmanager
async def _interrupts(reload: Callable[[], None]) -> AsyncIterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as it always did. SIGHUP calls ``reload``."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt() -> None:
        event.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, interrupt)
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield event
    finally:
        for number in (*numbers, signal.SIGHUP):
            loop.remove_signal_handler(number)
