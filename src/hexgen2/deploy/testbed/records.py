"""What stands of a test bed is written down before it is made, so that whoever comes next can clear it away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from hexgen2.deploy.testbed import quotas
from hexgen2.specs.base import Spec

FOLDER = Path("/run/hexgen2-testbed")


class Record(Spec):
    """A bed: its owner (process id, and the tick at which that process started) and what it made."""

    tag: str
    pid: int
    started: int
    interfaces: tuple[str, ...]
    namespaces: tuple[str, ...]
    groups: str

    @property
    def abandoned(self) -> bool:
        """Whether its owner is gone."""
        return start_tick(self.pid) != self.started

    def removal(self) -> list[tuple[str, ...]]:
        """The commands that take the network away. The links between nodes go with their namespaces."""
        return [
            *(("ip", "link", "delete", name) for name in self.interfaces),
            *(("ip", "netns", "delete", name) for name in self.namespaces),
        ]


def start_tick(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def keep(record: Record, folder: Path = FOLDER) -> None:
    """Write a record."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record.tag}.json").write_text(json.dumps(record.model_dump(mode="json")))


def kept(folder: Path = FOLDER) -> list[Record]:
    """All records; a file that is none is left alone."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValidationError):
            found.append(Record.model_validate_json(file.read_text()))
    return found


def clear(record: Record, folder: Path = FOLDER) -> None:
    """Kill what runs in a bed, take it down and forget it; harmless where parts are gone already."""
    for namespace in record.namespaces:
        for pid in _inhabitants(namespace):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    quotas.remove(Path(record.groups))
    for command in record.removal():
        _quietly(command)
    (folder / f"{record.tag}.json").unlink(missing_ok=True)


def sweep(folder: Path = FOLDER) -> list[str]:
    """Clear the beds whose owners are gone; their tags."""
    abandoned = [record for record in kept(folder) if record.abandoned]
    for record in abandoned:
        clear(record, folder)
    return [record.tag for record in abandoned]


def _inhabitants(namespace: str) -> list[int]:
    return [int(pid) for pid in _quietly(("ip", "netns", "pids", namespace)).split()]


def _quietly(command: Sequence[str]) -> str:
    """The output of a command that may fail because what it names is gone."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
