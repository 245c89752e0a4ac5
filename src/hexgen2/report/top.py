"""The essentials of a service that runs, for a terminal: what `/live/state` says, as tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hexgen2.report.reasons import rate_words

BARS = "▁▂▃▄▅▆▇█"
POINTS = 24
"""Bars that a line is drawn with."""
MOST_EVENTS = 8
ROLE_STYLE = {"prefill": "dark_orange3", "decode": "blue", "colocated": "green"}
BAD = {"down", "failure", "broken", "refused"}
Document = Mapping[str, Any]


def top_view(state: Document, lines: Mapping[str, Sequence[float | None]] | None = None) -> RenderableType:
    """All of it. ``lines``: columns of the history, of which the last samples are drawn."""
    parts: list[RenderableType] = [_headline(state), Text(), _figures(state, lines or {}), _totals(state)]
    parts += [Text(), _groups(state)]
    if state["routes"]:
        parts += [Text(), _routes(state)]
    if state["events"]:
        parts += [Text(), _events(state)]
    return Group(*parts)


def sparkline(values: Sequence[float | None]) -> str:
    """Values as bars from 0 to their largest, several in a row together where there are many; a blank where
    there is none.

    >>> sparkline([0.0, 1.0, None, 2.0])
    '▁▅ █'
    """
    each = max(1, -(-len(values) // POINTS))
    means = [_mean(values[at : at + each]) for at in range(0, len(values), each)]
    most = max((value for value in means if value is not None), default=0.0) or 1.0
    top = len(BARS) - 1
    return "".join(" " if value is None else BARS[int(value / most * top + 0.5)] for value in means)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _headline(state: Document) -> Text:
    plan = state["plan"]
    words = {"ok": ("serving", "green"), "draining": ("draining", "yellow")}
    status, style = words.get(state["status"], (state["status"], "red"))
    text = Text.assemble((state["model"], "bold"), "  ", (status, f"bold {style}"))
    if plan is not None:
        load = "the load as seen" if plan["workload"] == "observed" else plan["workload"]
        text.append(f"  {plan['cluster']}, planned for {load}, ${plan['price_per_hour']:.2f}/h")
    text.append(f"  {_clock(state['at'])}", "dim")
    return text


def _figures(state: Document, lines: Mapping[str, Sequence[float | None]]) -> Table:
    now, plan = state["now"], state["plan"]
    table = Table.grid(padding=(0, 2))
    planned = plan["throughput_rps"] if plan is not None else 0.0
    aim = f"{now['throughput_rps'] / planned:.0%} of the plan's {planned:.3g}" if planned else ""
    if now["capacity_rps"] is not None:
        aim += f"; {now['capacity_rps']:.3g} can be carried now"
    rows = [
        ("requests/s", f"{now['throughput_rps']:.3g}", aim, "throughput_rps"),
        (
            "output tokens/s",
            f"{now['output_tokens_per_s']:.4g}",
            f"plan {plan['output_tokens_per_s']:.4g}" if plan is not None else "",
            "output_tokens_per_s",
        ),
        ("TTFT P50", _seconds(now["ttft_p50_s"]), f"P99 {_seconds(now['ttft_p99_s'])}", "ttft_p50_s"),
        ("TPOT P50", _seconds(now["tpot_p50_s"]), f"P99 {_seconds(now['tpot_p99_s'])}", "tpot_p50_s"),
        ("in the service", f"{now['in_flight']:.0f}", f"{now['queued']:.0f} wait in the queue", "in_flight"),
    ]
    for name, value, more, column in rows:
        line = sparkline(lines[column]) if column in lines else ""
        table.add_row(Text(name, "dim"), Text(value, "bold", justify="right"), Text(line, "cyan"), Text(more))
    return table


def _totals(state: Document) -> Text:
    counted = ("answered", "refused", "errors", "retries", "migrations", "broken_off", "restarts")
    told = ", ".join(f"{state['totals'][name]:.0f} {name.replace('_', ' ')}" for name in counted)
    return Text.assemble(("since the start  ", "dim"), told)


def _groups(state: Document) -> Table:
    table = _table("group", "role", "state", "plan", "now", "req/s", "running", "KV cache", numbers=5)
    for group in state["groups"]:
        good = group["up"] and not group["tripped"]
        shown = "up" if good else "left alone" if group["up"] else f"down: {group['reason']}"
        batch = f"/{group['max_batch']}" if group["max_batch"] and group["role"] != "prefill" else ""
        capacity = f"/{group['capacity_rps']:.3g}" if group["capacity_rps"] else ""
        table.add_row(
            Text(group["id"], "bold"),
            Text(group["role"], ROLE_STYLE[group["role"]]),
            Text(shown, "" if good else "bold red"),
            _share(group["planned_share"]),
            _share(group["share"]),
            f"{group['rps']:.3g}{capacity}",
            f"{group['in_flight']:.0f}{batch}",
            f"{group['kv_used']:.0%}",
        )
    return table


def _routes(state: Document) -> Table:
    table = _table("route", "plan", "now", "req/s", "KV caches", numbers=4)
    for route in state["routes"]:
        kv = route["kv_bytes_per_s"]
        table.add_row(
            Text(f"{route['from']} → {route['to']}"),
            _share(route["planned_share"]),
            _share(route["share"]),
            f"{route['rps']:.3g}",
            "–" if kv is None else rate_words(kv),
        )
    return table


def _events(state: Document) -> Table:
    table = Table.grid(padding=(0, 2))
    for event in reversed(state["events"][-MOST_EVENTS:]):
        style = "red" if event["kind"] in BAD else ""
        table.add_row(Text(_clock(event["at"]), "dim"), Text(event["text"], style))
    return table


def _table(*columns: str, numbers: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place >= len(columns) - numbers else "left", no_wrap=True)
    return table


def _share(part: float | None) -> str:
    return "–" if part is None else f"{part:.1%}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
