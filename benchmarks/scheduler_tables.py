"""Markdown tables of scheduler.py's rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import geometric_mean, mean
from typing import Any

Row = dict[str, Any]
Instance = tuple[str, str, str]
HEAD = ("cluster", "model", "workload")


def instance_table(rows: Sequence[Row]) -> str:
    """One line per instance, one column per solver: requests/s (seconds), means over the seeds."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = []
    for key, by_solver in _grouped(rows).items():
        shown = []
        for solver in solvers:
            done = [row for row in by_solver[solver] if "rps" in row]
            rps, cpu = (mean(row[field] for row in done) if done else 0.0 for field in ("rps", "cpu_s"))
            shown.append(f"{rps:.2f} ({cpu:.1f} s)" if done else "-")
        gaps = [row["gap"] for row in by_solver["hexgen2"] if row.get("gap") is not None]
        lines.append([*key, *shown, f"{100 * mean(gaps):.1f}%" if gaps else "-"])
    return _table([*HEAD, *solvers, "gap"], lines)


def ten_times_table(rows: Sequence[Row]) -> str:
    """One line per instance: the search as it is, given ten times as long, and what the first reaches of it."""
    lines = []
    reached = []
    for key, by_solver in _grouped(rows).items():
        short, longer = (
            [r for r in by_solver["hexgen2"] if (r["time_limit_s"] is None) == own] for own in (1, 0)
        )
        pairs = [(a, b) for a, b in zip(short, longer, strict=True) if "rps" in a and "rps" in b]
        if not pairs:
            continue
        part = min(a["rps"] / b["rps"] for a, b in pairs)
        reached.append(part)
        cpu = max(a["cpu_s"] for a, _ in pairs)
        first, second = mean(a["rps"] for a, _ in pairs), mean(b["rps"] for _, b in pairs)
        lines.append([*key, f"{first:.2f}", f"{cpu:.2f}", f"{second:.2f}", f"{100 * part:.2f}%"])
    table = _table([*HEAD, "req/s", "CPU s", "req/s in ten times as long", "reached"], lines)
    within = sum(part >= 0.99 for part in reached)
    return f"{table}\n\n{within} of {len(reached)} instances are within 1% of ten times as long."


def ablation_table(rows: Sequence[Row]) -> str:
    """One line per instance, then the default solver's and the paper's ratios to every other."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = []
    for key, by_solver in _grouped(rows).items():
        values = [[row.get("rps", 0.0) for row in by_solver[solver]] for solver in solvers]
        lines.append([*key, *(f"{mean(found):.2f}" for found in values)])
    text = [_table([*HEAD, *solvers], lines), ""]
    ratios = [
        [f"{ours} / {other}", len(found), f"{mean(found):.2f}", f"{_geometric(found):.2f}", *_ends(found)]
        for ours in ("hexgen2", "paper")
        for other in solvers
        if other != ours and ours in solvers and (found := _ratios(rows, ours, other))
    ]
    text.append(_table(["ratio", "runs", "mean", "geometric mean", "least", "most"], ratios))
    return "\n".join(text)


def _ratios(rows: Sequence[Row], ours: str, other: str) -> list[float]:
    """Requests/s of one solver over another's, instance by instance and seed by seed."""
    found = {(_key(row), row["seed"], row["solver"]): row.get("rps", 0.0) for row in rows}
    pairs = [
        (value, found.get((key, seed, other), 0.0))
        for (key, seed, name), value in found.items()
        if name == ours
    ]
    return [value / base for value, base in pairs if base > 0]


def _geometric(values: Sequence[float]) -> float:
    return geometric_mean(values) if min(values) > 0 else 0.0


def _ends(values: Iterable[float]) -> tuple[str, str]:
    found = sorted(values)
    return f"{found[0]:.2f}", f"{found[-1]:.2f}"


def _key(row: Row) -> Instance:
    return row["cluster"], row["model"], row["workload"]


def _grouped(rows: Sequence[Row]) -> dict[Instance, dict[str, list[Row]]]:
    """Instance → solver → its rows."""
    cells: dict[Instance, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[_key(row)][row["solver"]].append(row)
    return cells


def _table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
