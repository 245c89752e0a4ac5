"""What an engine's log says about its death, in a few lines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

TAIL_BYTES = 256 * 1024

_PREFIX = re.compile(
    r"^\(\S+ pid=\d+\) (?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?)?"  # vLLM's own
    r"|^\[rank\d+\]: ?"
)
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b(?::\s*\S.*)?$")
_COMPLAINT = re.compile(r"\berror:|\bKilled\b|out of memory|No module named|guard:", re.IGNORECASE)
_WRAPPERS = ("Engine core initialization failed", "WorkerProc initialization failed", "KeyboardInterrupt")
"""Exceptions that only say that another process failed."""


def tail(path: Path, limit: int = TAIL_BYTES) -> list[str]:
    """The last lines of a file, without vLLM's prefixes and blank lines; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in (_PREFIX.sub("", raw).rstrip() for raw in text.splitlines()) if line.strip()]


def cause(lines: Iterable[str], limit: int = 4) -> list[str]:
    """The lines that most likely tell why a process died, oldest first, at most ``limit``.

    Exceptions come first, those that merely report another process's failure only where there is nothing
    better; then complaints without one; then simply the last lines.

    >>> cause(["loading", "ValueError: 3 heads", "RuntimeError: Engine core initialization failed"])
    ['ValueError: 3 heads']
    """
    lines = list(lines)
    exceptions = list(dict.fromkeys(line.strip() for line in lines if _EXCEPTION.match(line.strip())))
    roots = [line for line in exceptions if not any(wrapper in line for wrapper in _WRAPPERS)]
    complaints = list(dict.fromkeys(line.strip() for line in lines if _COMPLAINT.search(line)))
    for found in (roots, complaints, exceptions, [line.strip() for line in lines]):
        if found:
            return found[-limit:]
    return []
