"""Devices as parts of a processor: groups of processes with a quota, under cgroup v1 or v2."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hexgen2.specs.errors import InputError

PERIOD_US = 10_000
"""In each period a group may run for its part of it. Short, so that a token's time does not depend on where in
the period it falls; not shorter than a few timer ticks, since the kernel only looks then."""

VANISH_S = 5.0
"""How long killed processes may take to leave a group."""


@dataclass(frozen=True)
class Controller:
    """Where this machine's processor quotas are set. ``root``: the folder that groups are made in."""

    version: Literal[1, 2]
    root: Path

    def settings(self, cores: float | None) -> Mapping[str, str]:
        """What is written to which file for a quota of ``cores`` (None: no limit).

        Example: 0.25 cores: v1 {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "2500"},
        v2 {"cpu.max": "2500 10000"}.
        """
        quota = None if cores is None else max(1000, round(cores * PERIOD_US))
        if self.version == 2:
            return {"cpu.max": f"{'max' if quota is None else quota} {PERIOD_US}"}
        return {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(-1 if quota is None else quota)}

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

    def limit(self, folder: Path, cores: float | None) -> None:
        """Set a group's quota; InputError where the kernel refuses."""
        for name, text in self.settings(cores).items():
            try:
                (folder / name).write_text(text)
            except OSError as error:
                raise InputError(
                    "test bed",
                    str(folder / name),
                    f"cannot be set to {text!r} ({error.strerror})",
                    "run it as root on a machine whose cgroups control the processor",
                ) from None


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


def _offers_cpu(root: Path) -> bool:
    try:
        return "cpu" in (root / "cgroup.controllers").read_text().split()
    except OSError:
        return False


def remove(folder: Path) -> None:
    """Kill what runs in a group and the groups in it, and remove them; harmless where there is none."""
    deadline = time.monotonic() + VANISH_S
    while folder.is_dir() and time.monotonic() < deadline:
        for pid in _members(folder):
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


def _members(folder: Path) -> Iterator[int]:
    for file in folder.rglob("cgroup.procs"):
        with suppress(OSError):
            yield from map(int, file.read_text().split())
