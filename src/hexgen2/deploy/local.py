"""Run a deployment's processes on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from hexgen2.deploy import guard, logs
from hexgen2.deploy.launcher import EngineFailed, ProcessExit, Progress, ProgressCallback
from hexgen2.deploy.ports import is_this_machine, require_free
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.specs.errors import InputError

POLL_S = 0.1
SIGN_OF_LIFE_S = 5.0
GRACE_S = 10.0
"""How long engines may take to leave after SIGTERM before they are killed."""


@dataclass(eq=False)
class _Running:
    spec: ProcessSpec
    process: asyncio.subprocess.Process
    log: Path


class LocalLauncher:
    """Each process under a guard (see `guard`) in a session of its own, its output in a file of ``run_dir``.

    Nothing outlives this process: the guards end their engines when `stop` is called, when the `async with`
    block is left, and when this process dies, be it by SIGKILL.
    """

    def __init__(self, run_dir: Path, grace_s: float = GRACE_S) -> None:
        self.run_dir = run_dir
        self._grace_s = grace_s
        self._deployment: Deployment | None = None
        self._started_again: Counter[str] = Counter()
        self._started_once: set[str] = set()
        self._running: list[_Running] = []
        self._told: set[str] = set()
        self._started = 0.0

    async def __aenter__(self) -> LocalLauncher:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def start(self, deployment: Deployment) -> None:
        """Start every process; InputError for one that belongs on another machine or whose port is in use."""
        check_local(deployment)
        self._make_run_dir()
        (self.run_dir / "deployment.json").write_text(deployment.model_dump_json(indent=2) + "\n")
        self._deployment = deployment
        self._started = time.monotonic()
        try:
            for spec in deployment.processes:
                self._started_once.add(spec.group_id)
                self._running.append(await self._start_one(spec))
        except BaseException:
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
        tasks = {asyncio.create_task(running.process.wait()): running for running in alive}
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

    def pids(self) -> dict[str, int]:
        """The running guards' process ids, by the name of the process that each guards."""
        return {one.spec.name: one.process.pid for one in self._running if one.process.returncode is None}

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
        """Start a group once more that has ended, or one that was added; InputError where a port is in use."""
        assert self._deployment is not None, "there is nothing to start again"
        assert not any(one.spec.group_id == group_id for one in self._running), "end the group first"
        processes = self._deployment.group(group_id)
        _require_ports(processes)
        if group_id in self._started_once:
            self._started_again[group_id] += 1
        self._started_once.add(group_id)
        for spec in processes:
            self._told.discard(spec.name)
            self._running.append(await self._start_one(self._as_started(spec)))

    def log_of(self, group_id: str) -> Path:
        """The log of a group's first process, as it was started last."""
        assert self._deployment is not None, "nothing was started"
        return self.run_dir / self._as_started(self._deployment.group(group_id)[0]).log_name

    def _as_started(self, spec: ProcessSpec) -> ProcessSpec:
        times = self._started_again[spec.group_id]
        return spec.again(times) if times else spec

    async def stop(self) -> None:
        """End every process: SIGTERM, and SIGKILL for what is left after the grace time."""
        running, self._running = self._running, []
        await self._end(running)

    async def _end(self, running: Collection[_Running]) -> None:
        for one in running:
            with suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGTERM)
        bound_s = self._grace_s + guard.LAST_WORDS_S + 1.0
        # Shielded: a second Ctrl-C must not leave this half done.
        await asyncio.shield(asyncio.gather(*(_finish(one.process, bound_s) for one in running)))

    async def _start_one(self, spec: ProcessSpec) -> _Running:
        log = self.run_dir / spec.log_name
        env = {name: value for name, value in os.environ.items() if name not in spec.unset} | spec.env
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, str(self._grace_s), "--", *spec.argv),
                stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the guard that we are gone
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,  # the terminal's Ctrl-C is for us, not for the engines
            )
        return _Running(spec, process, log)

    def _make_run_dir(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                str(self.run_dir), "", f"cannot be made ({error.strerror})", "give a folder that can be written"
            ) from None

    def _exit_of(self, running: _Running) -> ProcessExit | None:
        code = running.process.returncode
        if code is None:
            return None
        cause = tuple(logs.cause(logs.tail(running.log)))
        return ProcessExit(running.spec.name, code if code >= 0 else 128 - code, cause, running.log)

    def _report(
        self, on_progress: ProgressCallback | None, process: str, ready: bool, count: int, total: int
    ) -> None:
        if on_progress:
            elapsed_s = time.monotonic() - self._started
            on_progress(Progress(process, ready, count, total, elapsed_s))


def check_local(deployment: Deployment) -> None:
    """InputError for a process whose node is another machine, or whose port is in use here."""
    for spec in deployment.processes:
        if not is_this_machine(spec.host):
            raise InputError(
                "--launcher local",
                f"node {spec.node}",
                f"is at {spec.host}, which is not this machine",
                "use --launcher ray, or `hexgen2 export` and start its part there",
            )
    _require_ports(deployment.processes)


def _require_ports(processes: Iterable[ProcessSpec]) -> None:
    for spec in processes:
        for purpose, port in spec.ports.items():
            require_free(spec.host, port, f"engine {spec.name}", purpose)


async def _is_ready(http: aiohttp.ClientSession, spec: ProcessSpec) -> bool:
    assert spec.readiness_url is not None
    try:
        async with http.get(spec.readiness_url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def _finish(process: asyncio.subprocess.Process, bound_s: float) -> None:
    try:
        await asyncio.wait_for(process.wait(), bound_s)
    except TimeoutError:  # the guard itself hangs
        guard.kill_tree(process.pid)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
