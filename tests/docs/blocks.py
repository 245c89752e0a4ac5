"""Commands and links in the project's Markdown pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(?:<!-- ([\w ]+) -->\n)?```(\w*)\n(.*?)```", re.S)
_INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.M)


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Each fenced block: the comment above it, its language, its text."""
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield match[1] or "", match[2], match[3]


def commands(text: str) -> list[list[str]]:
    """The lines of a block as words; lines that end with a backslash go on in the next one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


def hexgen2_commands(page: Path) -> list[list[str]]:
    """The arguments of every whole `hexgen2` command of a page; sketches with ... or [options] are left out."""
    text = page.read_text(encoding="utf-8")
    parts = [block for _, language, block in blocks(page) if language in ("", "sh", "bash")]
    parts += [match[0] for match in _INDENTED.finditer(_BLOCK.sub("", text))]
    found = []
    for part in parts:
        for line in part.replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("hexgen2 ") and not re.search(r"\.\.\.|…|\[|\||\bENGINE\b", line):
                found.append(shlex.split(line, comments=True)[1:])
    return found
