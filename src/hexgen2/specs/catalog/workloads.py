"""Workloads by name, from a trace file, or of one fixed length."""

from __future__ import annotations

import datetime
import re
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import yaml
from pydantic import Field

from hexgen2.specs.base import Spec
from hexgen2.specs.catalog.traces import read_csv, read_jsonl
from hexgen2.specs.errors import InputError, shown
from hexgen2.specs.workload import MOST_TOKENS, FloatArray, Lengths, Marginals, Workload

_FIXED = re.compile(r"fixed:(\d{1,10})/(\d{1,10})")


class TraceSource(Spec):
    """The trace that workloads were fitted on: where it is published, and when it was read."""

    title: str
    url: str
    licence: str
    read: datetime.date


class WorkloadEntry(Spec):
    """A fitted workload: lengths at the file's ``levels``, and Spearman's rank correlation of the two."""

    description: str
    trace: str
    requests: int = Field(ge=1)
    mean_rps: float = Field(gt=0)
    rank_correlation: float = Field(ge=-1, le=1)
    inputs: tuple[float, ...]
    outputs: tuple[float, ...]


class WorkloadTable(Spec):
    """workloads.yaml, as benchmarks/workload_fit.py writes it."""

    levels: tuple[float, ...]
    traces: dict[str, TraceSource]
    workloads: dict[str, WorkloadEntry]


def workload_names() -> tuple[str, ...]:
    """Every shipped workload, in the catalog's order."""
    return tuple(workload_table().workloads)


def load_workload(name_or_path: str) -> Workload:
    """A shipped workload, ``fixed:INPUT/OUTPUT``, or a trace file: a .csv with Azure's columns, a .jsonl with
    Mooncake's.

    A shipped one has no arrival times: its user draws them, from a Poisson process (``mean_rps`` is the rate of
    its trace). Raises InputError for an unknown name and for a file that is not such a trace.
    """
    if name_or_path in workload_table().workloads:
        return _shipped(name_or_path)
    if name_or_path.startswith("fixed:"):
        return _fixed(name_or_path)
    path = Path(name_or_path)
    if path.suffix == ".csv":
        return read_csv(path)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    problem = (
        f"{name_or_path!r} ends neither in .csv nor in .jsonl"
        if path.exists()
        else f"unknown workload {name_or_path!r}"
    )
    known = ", ".join(workload_names())
    raise InputError(
        "workload", "", problem, f"use one of {known}, fixed:INPUT/OUTPUT, or a .csv or .jsonl trace"
    )


@cache
def workload_table() -> WorkloadTable:
    """The shipped workloads."""
    text = resources.files("hexgen2.specs.catalog").joinpath("workloads.yaml").read_text(encoding="utf-8")
    return WorkloadTable.model_validate(yaml.safe_load(text))


@cache
def _shipped(name: str) -> Workload:
    table = workload_table()
    entry = table.workloads[name]
    levels, inputs, outputs = (_frozen(values) for values in (table.levels, entry.inputs, entry.outputs))
    marginals = Marginals(levels, inputs, outputs, entry.rank_correlation)
    return Workload(name=name, marginals=marginals, mean_rps=entry.mean_rps)


def _frozen(values: tuple[float, ...]) -> FloatArray:
    """An array that cannot be written to: it is cached and shared."""
    array = np.array(values)
    array.setflags(write=False)
    return array


def _fixed(name: str) -> Workload:
    match = _FIXED.fullmatch(name)
    lengths = [int(part) for part in match.groups()] if match else []
    if not lengths or min(lengths) < 1 or max(lengths) > MOST_TOKENS:
        raise InputError(
            "workload",
            "",
            f"{shown(name)} does not give two lengths of at least 1 and at most {MOST_TOKENS:,}",
            "write fixed:INPUT/OUTPUT",
        )
    prompt, answer = (np.array([length], dtype=np.int64) for length in lengths)
    return Workload(name=name, trace=Lengths(prompt, answer))
