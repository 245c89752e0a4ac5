"""Plots (SVG) of scheduler.py's rows: the best value over time, and time and gap by cluster size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")
from matplotlib import pyplot as plt

Row = dict[str, Any]
AIMS = {64: 1.0, 320: 5.0, 1024: 30.0}
"""Seconds that a plan may take, by GPUs."""


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    """The mean over instances of the best value so far, in parts of the best that any solver reached there.

    Solvers that count routes singly while they search may stand above what their plans carry: they are drawn
    scaled to the value of their plan.
    """
    best: dict[tuple[str, ...], float] = defaultdict(float)
    for row in rows:
        best[_key(row)] = max(best[_key(row)], row.get("rps", 0.0), row.get("final_rps", 0.0))
    done = [row for row in rows if row.get("curve")]
    if not done:
        return
    end = max(row["time_limit_s"] or row["cpu_s"] for row in done)
    times = np.linspace(0.0, end, 200)
    figure, axes = plt.subplots(figsize=(7, 4))
    for solver in dict.fromkeys(row["solver"] for row in done):
        mine = [row for row in done if row["solver"] == solver]
        parts = [_sampled(row, times) / best[_key(row)] for row in mine]
        axes.plot(times, np.mean(parts, axis=0), label=solver, drawstyle="steps-post")
    axes.set_xlabel("seconds of search")
    axes.set_ylabel("requests/s, parts of the best known")
    axes.set_ylim(0, 1.05)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_sizes(rows: Sequence[Row], path: Path) -> None:
    """Seconds for a plan and its gap to the bound, over the number of GPUs (the default solver)."""
    mine = [row for row in rows if row["solver"] == "hexgen2" and "rps" in row and row["time_limit_s"] is None]
    if not mine:
        return
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    for model in dict.fromkeys(row["model"] for row in mine):
        found = [row for row in mine if row["model"] == model]
        above.scatter([row["gpus"] for row in found], [row["cpu_s"] for row in found], s=14, label=model)
        below.scatter([row["gpus"] for row in found], [100 * row["gap"] for row in found], s=14, label=model)
    above.plot(list(AIMS), list(AIMS.values()), "k--", linewidth=1, label="aim")
    above.set_yscale("log")
    above.set_ylabel("seconds of CPU")
    above.legend()
    below.set_ylabel("gap to the bound, %")
    below.set_xlabel("GPUs")
    below.set_xscale("log", base=2)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _sampled(row: Row, times: np.ndarray) -> np.ndarray:
    """The row's best value so far at those times, its last one being what the plan carries."""
    seconds, values = np.array(row["curve"]).T
    place = np.searchsorted(seconds, times, side="right")
    steps = np.concatenate([[0.0], values])
    return np.asarray(steps[place] * (row.get("final_rps", row["rps"]) / values[-1]))


def _key(row: Row) -> tuple[str, ...]:
    return row["cluster"], row["model"], row["workload"]
