"""Files that are read again when they change: API keys, certificates. One that is wrong changes nothing."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Protocol

from hexgen2.coordinator.watches import going_on
from hexgen2.specs.errors import InputError

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


class Reloadable(Protocol):
    """Something that was read from files."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Where it comes from; empty where it does not come from files."""
        ...

    def reload(self) -> None:
        """Read the files again; InputError where they are wrong, and then all is as it was."""
        ...


class Reloader:
    """Looks at the files once a second, or when told to (`look`, for SIGHUP)."""

    def __init__(self, things: list[Reloadable]) -> None:
        self._things = [thing for thing in things if thing.files]
        self._seen = [_stamp(thing) for thing in self._things]

    async def run(self) -> None:
        """Until cancelled."""
        while self._things:
            await asyncio.sleep(_LOOK_EVERY_S)
            with going_on("watch over files"):
                self.look()

    def look(self, force: bool = False) -> None:
        """Read again what has changed (`force`: everything)."""
        for number, thing in enumerate(self._things):
            stamp = _stamp(thing)
            if stamp == self._seen[number] and not force:
                continue
            self._seen[number] = stamp
            try:
                thing.reload()
            except (InputError, OSError) as error:  # the latter where it changes while it is read
                log.error("not taken over, the former stays in use: %s", error)
            else:
                log.info("read again: %s", ", ".join(map(str, thing.files)))


def _stamp(thing: Reloadable) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes when a file is written or replaced."""
    stamps: list[tuple[int, int, int] | None] = []
    for path in thing.files:
        try:
            status = path.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(stamps)
