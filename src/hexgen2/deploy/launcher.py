"""What every launcher can do, and what it says when an engine fails."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hexgen2.deploy.spec import Deployment, ProcessSpec


@dataclass(frozen=True)
class Progress:
    """How far a start-up is: one event per process that became ready, and a sign of life now and then."""

    process: str
    """The process that became ready, or that is still awaited."""
    ready: bool
    ready_count: int
    total: int
    elapsed_s: float


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class ProcessExit:
    """A process that ended though nobody asked it to."""

    process: str
    exit_code: int
    cause: tuple[str, ...]
    """The lines of its log that most likely say why."""
    log: Path
    lost: bool = False
    """Nobody saw it end: its node is gone, or whatever held it there."""


class EngineFailed(RuntimeError):
    """An engine ended, or was not ready in time. ``str`` is for the user: what, why, and where to read on."""

    def __init__(self, process: str, problem: str, cause: tuple[str, ...], log: Path) -> None:
        self.process = process
        self.problem = problem
        self.cause = cause
        self.log = log
        reasons = "".join(f"\n  {line}" for line in cause)
        super().__init__(f"engine {process} {problem}{reasons}\n  (whole log: {log})")

    @classmethod
    def exited(cls, gone: ProcessExit) -> EngineFailed:
        if gone.lost:
            return cls(gone.process, "is lost", gone.cause, gone.log)
        how = f"was killed by signal {gone.exit_code - 128}" if gone.exit_code > 128 else "ended"
        return cls(gone.process, f"{how} (exit code {gone.exit_code})", gone.cause, gone.log)


class GroupLauncher(Protocol):
    """Starts and ends the groups of a deployment one by one: what a supervisor needs."""

    async def watch(self, group_id: str | None = None) -> ProcessExit:
        """Return when a process (of that group) ends by itself; waits until cancelled."""
        ...

    async def end_group(self, group_id: str) -> None:
        """End what is left of a group, within a bounded time. Its ends are not told of by `watch`."""

    async def start_group(self, group_id: str) -> None:
        """Start a group that has ended once more; InputError where it cannot run."""

    async def wait_ready(
        self,
        timeout_s: float,
        on_progress: ProgressCallback | None = None,
        groups: Collection[str] | None = None,
    ) -> None:
        """Return when all engines answer (those of ``groups``, where given); EngineFailed when one of them ends
        or is not ready within ``timeout_s``."""

    def log_of(self, group_id: str) -> Path:
        """The log of a group's first process."""
        ...

    def absent(self, group_id: str) -> Collection[str]:
        """The nodes of a group that are gone: until they are back it cannot be started."""
        ...


class Launcher(GroupLauncher, Protocol):
    """Runs a deployment's processes. Used as `async with`: leaving the block stops whatever was started."""

    async def __aenter__(self) -> Launcher: ...

    async def __aexit__(self, *exception: object) -> None: ...

    async def start(self, deployment: Deployment) -> None:
        """Start every process; InputError where one cannot run here (and then nothing is left running)."""

    def add(self, processes: Collection[ProcessSpec]) -> None:
        """Take over the processes of further groups, or others in place of a group's, for `start_group`."""

    async def stop(self) -> None:
        """End every process, within a bounded time; harmless when there is none."""
