"""Devices as parts of a processor: groups of processes with a quota, under cgroup v1 or v2."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hexgen2.specs.errors import InputError

PERIOD_US = 25_000
"""In each period a group may run for its part of it. What runs after a pause finds its caches taken by others:
at a third of a core between other work, Python code needed 1.5 times its processor time with a period of 10 ms,
1.25 times with 40 ms, 1.1 times with 100 ms (`benchmarks/testbed_slices.py`). But what begins after a pause has
a whole period's part at once, and so is the faster the longer the period is."""

MOST_WEIGHT = {1: ("cpu.shares", 262_144), 2: ("cpu.weight", 10_000)}
"""The kernel's largest weight of a group, and its file, by version. The usual ones are 1024 and 100."""

VANISH_S = 5.0
"""How long killed processes may take to leave a group."""


@dataclass(frozen=True)
class Controller:
    """Where this machine's processor quotas are set. ``root``: the folder that groups are made in."""

    version: Literal[1, 2]
    root: Path

    def settings(self, cores: float | None, period_us: int = PERIOD_US) -> Mapping[str, str]:
        """What is written to which file for a quota of ``cores`` (None: no limit).

        Example: 0.25 cores: v1 {"cpu.cfs_period_us": "25000", "cpu.cfs_quota_us": "6250"},
        v2 {"cpu.max": "6250 25000"}.
        """
        quota = None if cores is None else max(1000, round(cores * period_us))
        if self.version == 2:
            return {"cpu.max": f"{'max' if quota is None else quota} {period_us}"}
        return {"cpu.cfs_period_us": str(period_us), "cpu.cfs_quota_us": str(-1 if quota is None else quota)}

    def make(self, *names: str) -> Path:
        """A group without a limit, inside the groups named before it."""
        folder = self.root
        for name in names:
            if self.version == 2:  # a group's quota is offered by the one that it is in
                with suppress(OSError):  # where it cannot be, `limit` fails and says so
                    (folder / "cgroup.subtree_control").write_text("+cpu")
            folder /= name
            folder.mkdir(exist_ok=True)
        return folder

    def limit(self, folder: Path, cores: float | None, period_us: int = PERIOD_US) -> None:
        """Set a group's quota; InputError where the kernel refuses."""
        for name, text in self.settings(cores, period_us).items():
            _write(folder / name, text)

    def favour(self, folder: Path) -> None:
        """Let a group run before all that is in other groups beside it."""
        name, weight = MOST_WEIGHT[self.version]
        _write(folder / name, str(weight))

    def group_of(self, membership: str) -> Path:
        """The group of a process with this text in its /proc/PID/cgroup.

        Examples, for a mount at /m: v1 "1:cpu,cpuacct:/a" and v2 "0::/a" are /m/a.
        """
        for line in membership.splitlines():
            _, controllers, path = line.split(":", 2)
            if (self.version == 2 and not controllers) or (
                self.version == 1 and "cpu" in controllers.split(",")
            ):
                return self.root / path.lstrip("/")
        return self.root


def pinned(parts: Mapping[str, float], cores: Sequence[int]) -> dict[str, int]:
    """The core that each part of one is on: the largest parts first, each on the core with the most left.

    A part that ran on several cores would find cold caches wherever it comes to. Parts of more than a core are
    left out.

    Example: parts of 0.7, 0.2, 0.2 and 0.2 on two cores: the large one alone, the others together.
    """
    taken = dict.fromkeys(cores, 0.0)
    found: dict[str, int] = {}
    for name, part in sorted(parts.items(), key=lambda entry: -entry[1]):
        if part <= 1.0:
            found[name] = min(taken, key=taken.__getitem__)
            taken[found[name]] += part
    return found


def pin(pids: Iterable[int], core: int) -> None:
    """Let all threads of these processes run on one core only; what has ended meanwhile is left out."""
    for pid in pids:
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), {core})


def members(folder: Path) -> list[int]:
    """The processes in a group and in the groups in it."""
    found: list[int] = []
    for file in folder.rglob("cgroup.procs"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def move(pids: Iterable[int], folder: Path) -> None:
    """Put processes into a group, but those that have ended; InputError where the kernel refuses."""
    for pid in pids:
        with suppress(ProcessLookupError):
            _write(folder / "cgroup.procs", str(pid))


def find_controller(mounts: str) -> Controller | None:
    """The processor's controller among the mounts (the text of /proc/mounts); None where there is none."""
    entries = [line.split() for line in mounts.splitlines()]
    for _, where, kind, options, *_ in entries:
        if kind == "cgroup" and "cpu" in options.split(","):
            return Controller(1, Path(where))
    for _, where, kind, *_ in entries:
        if kind == "cgroup2" and _offers_cpu(Path(where)):
            return Controller(2, Path(where))
    return None


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except ProcessLookupError:
        raise
    except OSError as error:
        raise InputError(
            "test bed",
            str(file),
            f"cannot be set to {text!r} ({error.strerror})",
            "run it as root on a machine whose cgroups control the processor",
        ) from None


def _offers_cpu(root: Path) -> bool:
    try:
        return "cpu" in (root / "cgroup.controllers").read_text().split()
    except OSError:
        return False


def remove(folder: Path) -> None:
    """Kill what runs in a group and the groups in it, and remove them; harmless where there is none."""
    deadline = time.monotonic() + VANISH_S
    while folder.is_dir() and time.monotonic() < deadline:
        for pid in members(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for inner in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
            if inner.is_dir():
                with suppress(OSError):
                    inner.rmdir()
        with suppress(OSError):
            folder.rmdir()
        if folder.is_dir():
            time.sleep(0.05)
