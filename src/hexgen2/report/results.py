"""The results of a run (simulated or measured) as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(console: Console, document: Mapping[str, Any]) -> None:
    """The document of `hexgen2.specs.results.Results` for a person."""
    console.print(
        f"{document['completed']} of {document['requests']} requests in {document['duration_s']:.1f} s, "
        f"{document['failed']} failed: {document['throughput_rps']:.3g} req/s, "
        f"{document['output_tokens_per_s']:.4g} output tokens/s"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("latency")
    for heading in ("mean", "P50", "P90", "P99"):
        table.add_column(heading, justify="right")
    for label, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2e_s")):
        table.add_row(label, *(seconds_words(document[key][part]) for part in ("mean", "p50", "p90", "p99")))
    console.print(table)
    slo = document["slo"]
    if slo["ttft"] is not None or slo["tpot"] is not None:
        console.print(f"SLO met by {slo['attainment']:.1%}, goodput {slo['goodput_rps']:.3g} req/s")
    moved = document["kv_transfer"]
    if moved["bytes"]:
        console.print(
            f"KV moved: {moved['bytes'] / 2**20:.1f} MiB, {seconds_words(moved['mean_s'])} a transfer"
        )


def seconds_words(seconds: float | None) -> str:
    """'12.3 ms', '4.56 s', '-' for None."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
