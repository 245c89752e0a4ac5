"""Request traces: Azure's CSV and Mooncake's JSON lines."""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hexgen2.specs import files
from hexgen2.specs.errors import InputError, shown
from hexgen2.specs.workload import MOST_TOKENS, Lengths, Workload

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")


class _Request(NamedTuple):
    """A row of a trace: arrival in seconds from any origin, lengths in tokens."""

    arrival_s: float
    prompt: int
    answer: int


def read_csv(path: Path) -> Workload:
    """A trace with the columns TIMESTAMP (ISO 8601), ContextTokens and GeneratedTokens, others ignored.

    Raises InputError that names the row: of missing columns, a bad time, or a length that is not at least 1.
    """
    return _workload(str(path), list(_csv_rows(path)))


def read_jsonl(path: Path) -> Workload:
    """A trace of one JSON object per line with timestamp (milliseconds), input_length and output_length.

    Raises InputError that names the row: of broken JSON, a missing field, or a length that is not at least 1.
    """
    return _workload(str(path), list(_jsonl_rows(path)))


def _workload(source: str, requests: list[_Request]) -> Workload:
    """Requests in order of arrival, times counted from the first."""
    if not requests:
        raise InputError(source, "", "has no requests", "give a trace with at least one row")
    arrivals = np.array([request.arrival_s for request in requests])
    order = np.argsort(arrivals, kind="stable")
    prompts = np.array([request.prompt for request in requests], dtype=np.int64)[order]
    answers = np.array([request.answer for request in requests], dtype=np.int64)[order]
    arrivals = arrivals[order] - arrivals.min()
    duration = float(arrivals[-1])
    rate = (len(requests) - 1) / duration if duration > 0 else None
    return Workload(name=source, trace=Lengths(prompts, answers), arrivals_s=arrivals, mean_rps=rate)


def _csv_rows(path: Path) -> Iterator[_Request]:
    source = str(path)
    text = files.read_text(path, "CSV trace").removeprefix("\ufeff")
    reader = csv.DictReader(text.splitlines())
    columns = reader.fieldnames
    if columns is None:
        raise InputError(
            source, "", "is empty", f"write the columns {','.join(_AZURE)} and one row per request"
        )
    missing = [name for name in _AZURE if name not in columns]
    if missing:
        raise InputError(
            source, "row 1", f"lacks the column {', '.join(missing)}", f"name the columns {','.join(_AZURE)}"
        )
    for record in _records(reader, source):
        row = f"row {reader.line_num}"
        yield _Request(
            _seconds(record["TIMESTAMP"], source, f"{row}, TIMESTAMP"),
            _length(_whole(record["ContextTokens"]), source, f"{row}, ContextTokens"),
            _length(_whole(record["GeneratedTokens"]), source, f"{row}, GeneratedTokens"),
        )


def _records(reader: csv.DictReader[str], source: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV file; what is no CSV is told with its row."""
    try:
        yield from reader
    except csv.Error as error:
        row = f"row {reader.line_num + 1}"
        raise InputError(source, row, f"is not CSV ({error})", "write one request per line") from None


def _jsonl_rows(path: Path) -> Iterator[_Request]:
    source = str(path)
    text = files.read_text(path, "JSONL trace").removeprefix("\ufeff")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        row = f"row {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(source, row, f"is not JSON ({error.msg})", "write one object per line") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
            raise InputError(source, row, "is no JSON that can be read", "write one object per line") from None
        if not isinstance(record, dict):
            raise InputError(source, row, "is not a JSON object", "write one object per line")
        for name in _MOONCAKE:
            if name not in record:
                raise InputError(source, row, f"lacks {name}", f"give each row {', '.join(_MOONCAKE)}")
        yield _Request(
            _milliseconds(record["timestamp"], source, f"{row}, timestamp") * 1e-3,
            _length(record["input_length"], source, f"{row}, input_length"),
            _length(record["output_length"], source, f"{row}, output_length"),
        )


def _seconds(text: str | None, source: str, field: str) -> float:
    """Seconds since 1970 of an ISO 8601 time; UTC where it has no zone."""
    try:
        time = datetime.datetime.fromisoformat((text or "").strip())
    except ValueError:
        raise InputError(
            source, field, f"{text!r} is not a time", "write it like 2023-11-16 18:15:46.680590"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()


def _milliseconds(value: object, source: str, field: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond all floats
        pass
    raise InputError(source, field, f"{shown(value)} is not a time", "write milliseconds as a number")


def _whole(text: str | None) -> object:
    """The number that a CSV cell holds; the cell as it is where it holds none."""
    try:
        return int(text or "")
    except ValueError:
        return text


def _length(value: object, source: str, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
        raise InputError(
            source,
            field,
            f"{shown(value)} is not a whole number of at least 1 and at most {MOST_TOKENS:,}",
            "correct the row or leave it out",
        )
    return value
