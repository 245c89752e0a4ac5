"""What the launchers have in common: which processes run, which are awaited, which have ended.

How a process is started and ended is theirs.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

import aiohttp

from hexgen2.deploy import logs
from hexgen2.deploy.launcher import EngineFailed, ProcessExit, Progress, ProgressCallback
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.specs.errors import InputError

POLL_S = 0.1
SIGN_OF_LIFE_S = 5.0
GRACE_S = 10.0
"""How long engines may take to leave after SIGTERM before they are killed."""


class Running(Protocol):
    """A process that was started.

    ``exit_code``: None while it runs, 128 + n for signal n. ``words``: what is known of one that nobody saw
    end.
    """

    @property
    def spec(self) -> ProcessSpec: ...

    @property
    def log(self) -> Path: ...

    @property
    def exit_code(self) -> int | None: ...

    @property
    def words(self) -> tuple[str, ...]: ...

    async def wait(self) -> object:
        """Return when it has ended."""


R = TypeVar("R", bound=Running)


class ProcessLauncher(ABC, Generic[R]):
    """Runs a deployment's processes, group by group, their output in files of ``run_dir``."""

    def __init__(self, run_dir: Path, grace_s: float = GRACE_S) -> None:
        self.run_dir = run_dir
        self._grace_s = grace_s
        self._deployment: Deployment | None = None
        self._started_again: Counter[str] = Counter()
        self._started_once: set[str] = set()
        self._running: list[R] = []
        self._told: set[str] = set()
        self._started = 0.0

    @abstractmethod
    async def _check(self, processes: Sequence[ProcessSpec]) -> None:
        """InputError for a process that cannot be started here."""

    @abstractmethod
    async def _launch(self, processes: Sequence[ProcessSpec]) -> list[R]:
        """Start the processes of a group, all or none of them."""

    @abstractmethod
    async def _end(self, running: Collection[R]) -> None:
        """End processes, within a bounded time."""

    def absent(self, group_id: str) -> Collection[str]:  # noqa: ARG002 (for launchers that know)
        """The nodes of a group that are gone."""
        return ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def start(self, deployment: Deployment) -> None:
        """Start every process; InputError for one that cannot run here, and then none is left running."""
        await self._check(deployment.processes)
        self._make_run_dir()
        (self.run_dir / "deployment.json").write_text(deployment.model_dump_json(indent=2) + "\n")
        self._deployment = deployment
        self._started = time.monotonic()
        groups = tuple(dict.fromkeys(spec.group_id for spec in deployment.processes))
        self._started_once.update(groups)
        starts = [asyncio.create_task(self._start(deployment.group(group))) for group in groups]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for task in starts:
                task.cancel()
            await asyncio.wait(starts)
            await self.stop()
            raise

    async def wait_ready(
        self,
        timeout_s: float,
        on_progress: ProgressCallback | None = None,
        groups: Collection[str] | None = None,
    ) -> None:
        """Poll the readiness URLs until all answer; EngineFailed as soon as a process ends, or at the end."""
        deadline = time.monotonic() + timeout_s
        awaited = [one for one in self._running if groups is None or one.spec.group_id in groups]
        waiting = {running.spec.name: running for running in awaited if running.spec.readiness_url}
        total = len(waiting)
        next_sign = time.monotonic() + SIGN_OF_LIFE_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as http:
            while waiting:
                for running in awaited:
                    if gone := self._exit_of(running):
                        raise EngineFailed.exited(gone)
                ready = [name for name, running in waiting.items() if await _is_ready(http, running.spec)]
                for name in ready:
                    del waiting[name]
                    self._report(on_progress, name, True, total - len(waiting), total)
                now = time.monotonic()
                if waiting and now >= deadline:
                    running = next(iter(waiting.values()))
                    cause = tuple(logs.cause(logs.tail(running.log)))
                    raise EngineFailed(
                        running.spec.name, f"was not ready within {timeout_s:g} s", cause, running.log
                    )
                if waiting and now >= next_sign:
                    next_sign = now + SIGN_OF_LIFE_S
                    self._report(on_progress, next(iter(waiting)), False, total - len(waiting), total)
                if waiting:
                    await asyncio.sleep(POLL_S)

    async def watch(self, group_id: str | None = None) -> ProcessExit:
        """Return when a process (of that group) ends by itself; each process is told of once."""
        alive = [
            running
            for running in self._running
            if running.spec.name not in self._told and group_id in (None, running.spec.group_id)
        ]
        tasks = {asyncio.ensure_future(running.wait()): running for running in alive}
        try:
            if not tasks:
                await asyncio.get_running_loop().create_future()  # nothing left that could end
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        running = tasks[done.pop()]
        self._told.add(running.spec.name)
        gone = self._exit_of(running)
        assert gone is not None, "its wait ended, so it did"
        return gone

    async def end_group(self, group_id: str) -> None:
        """End what is left of a group, as `stop` does."""
        ending = [one for one in self._running if one.spec.group_id == group_id]
        await self._end(ending)
        # Only now: whoever stops the launcher in the meantime must find them.
        self._running = [one for one in self._running if one not in ending]

    def add(self, processes: Collection[ProcessSpec]) -> None:
        """Take over the processes of further groups, or others in place of a group's, for `start_group`."""
        assert self._deployment is not None, "there is nothing to add to"
        groups = {spec.group_id for spec in processes}
        kept = [spec for spec in self._deployment.processes if spec.group_id not in groups]
        self._deployment = self._deployment.model_copy(update={"processes": (*kept, *processes)})

    async def start_group(self, group_id: str) -> None:
        """Start a group once more that has ended, or one that was added; InputError where it cannot run."""
        assert self._deployment is not None, "there is nothing to start again"
        assert not any(one.spec.group_id == group_id for one in self._running), "end the group first"
        processes = self._deployment.group(group_id)
        await self._check(processes)
        if group_id in self._started_once:
            self._started_again[group_id] += 1
        self._started_once.add(group_id)
        for spec in processes:
            self._told.discard(spec.name)
        await self._start([self._as_started(spec) for spec in processes])

    def log_of(self, group_id: str) -> Path:
        """The log of a group's first process, as it was started last."""
        assert self._deployment is not None, "nothing was started"
        return self.run_dir / self._as_started(self._deployment.group(group_id)[0]).log_name

    async def stop(self) -> None:
        """End every process: SIGTERM, and SIGKILL for what is left after the grace time."""
        running, self._running = self._running, []
        await self._end(running)

    async def _start(self, processes: Sequence[ProcessSpec]) -> None:
        started = await self._launch(processes)  # other groups may come and go meanwhile
        self._running += started

    def _as_started(self, spec: ProcessSpec) -> ProcessSpec:
        times = self._started_again[spec.group_id]
        return spec.again(times) if times else spec

    def _make_run_dir(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                str(self.run_dir), "", f"cannot be made ({error.strerror})", "give a folder that can be written"
            ) from None

    def _exit_of(self, running: R) -> ProcessExit | None:
        code = running.exit_code
        if code is None:
            return None
        cause = running.words or tuple(logs.cause(logs.tail(running.log)))
        return ProcessExit(running.spec.name, code, cause, running.log, lost=bool(running.words))

    def _report(
        self, on_progress: ProgressCallback | None, process: str, ready: bool, count: int, total: int
    ) -> None:
        if on_progress:
            elapsed_s = time.monotonic() - self._started
            on_progress(Progress(process, ready, count, total, elapsed_s))


async def _is_ready(http: aiohttp.ClientSession, spec: ProcessSpec) -> bool:
    assert spec.readiness_url is not None
    try:
        async with http.get(spec.readiness_url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
