"""Results on disk, so that an interrupted run goes on where it was: one JSON object a line, by key.

They are kept for the code that made them: when the planner, the cost model, the simulator, the clusters or the
cases change, the file begins anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
ROOMS = ("specs", "cost", "scheduler", "simulator")
OURS = ("paper_cases.py", "paper_systems.py", "paper_measure.py", "paper_budget.py")


class Store:
    """The rows of a folder's results, by key."""

    def __init__(self, folder: Path, made_by: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "rows.jsonl"
        self._rows: dict[str, Row] = {}
        if not self._read(made_by):
            self._rows.clear()
            self._file.write_text(json.dumps({"made_by": made_by}) + "\n", encoding="utf-8")

    def _read(self, made_by: str) -> bool:
        """Read what is there; False when it was made by other code."""
        if not self._file.is_file():
            return False
        text = self._file.read_text(encoding="utf-8")
        head, *lines = text.splitlines() or [""]
        if head != json.dumps({"made_by": made_by}):
            return False
        if not text.endswith("\n"):
            self._file.write_text(text + "\n", encoding="utf-8")
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            self._rows[entry["key"]] = entry["row"]
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return self._rows[key]

    def put(self, key: str, row: Row) -> None:
        """Keep a row, on disk at once."""
        self._rows[key] = row
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "row": row}) + "\n")


def fingerprint(files: Iterable[Path]) -> str:
    """A digest of files' contents, whatever their order."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def sources() -> list[Path]:
    """The files that results depend on."""
    found = [ROOT / "benchmarks" / name for name in OURS]
    for room in ROOMS:
        found += [
            path for path in (ROOT / "src" / "hexgen2" / room).rglob("*.*") if path.suffix in (".py", ".yaml")
        ]
    return found + list((ROOT / "examples" / "clusters").glob("*.yaml"))
