"""What a command prints: results on stdout (one JSON document with ``--json``), everything else on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from hexgen2.specs.errors import InputError
from hexgen2.specs.finite import finite


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else on stdout"
    )


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout; infinities and NaN become null, for they are not JSON."""
    json.dump(finite(document), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def progress_console() -> Console:
    """The console for progress and logs. Brackets in names and in engines' logs are no markup."""
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def result_console() -> Console:
    """The console for results that a person reads; wide enough for its tables where it is no terminal."""
    width = None if sys.stdout.isatty() else 120
    return Console(highlight=False, soft_wrap=True, width=width, markup=False)


def write_json(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: to a neighbour first, then renamed over it."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(str(path), "", f"cannot be written ({reason})", "give another path") from None
