"""Plots (SVG) like the paper's figures, and of what decides."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import matplotlib as mpl
import numpy as np
from paper_cases import (
    ABLATED,
    BASE_TARGETS,
    CLASSES,
    HOMOGENEOUS,
    LINK_SCALES,
    MIXED,
    MODELS,
    SYSTEMS,
    TRACE,
    WORLDS,
    Case,
    ablation_cases,
    link_cases,
)
from paper_summary import (
    Rows,
    against_distserve,
    against_hexgen,
    between,
    figure_of,
    mean_per_dollar,
    online_key,
    ratios,
    rentals,
    spread,
)
from paper_tables import H100_PRICES, PAPER_PRICE, WANTED

mpl.use("svg")
from matplotlib import pyplot as plt

mpl.rcParams["svg.hashsalt"] = "paper"
mpl.rcParams["svg.fonttype"] = "none"

BARS = ("ours", "ours-vllm", "paper", "hexgen", "colocated")
SHOWN = (*MIXED, "mixed-5")


subplots = partial(plt.subplots, layout="constrained")


def plot_all(rows: Rows, folder: Path) -> None:
    """Every plot of which there are rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (
        ("throughput", plot_throughput),
        ("deadlines", plot_deadlines),
        ("assumptions", plot_assumptions),
        ("price", plot_price),
        ("ablation", plot_ablation),
        ("links", plot_links),
    ):
        figure = draw(rows)
        if figure is not None:
            figure.savefig(folder / f"paper-{name}.svg", metadata={"Date": None})
            plt.close(figure)


def plot_throughput(rows: Rows) -> plt.Figure | None:
    """Requests/s by setting and system, a panel per model and load; the line is DistServe-like on 8 H100."""
    if figure_of(rows, Case("distserve", HOMOGENEOUS, MODELS[0], CLASSES[1])) is None:
        return None
    figure, panels = subplots(len(MODELS), len(CLASSES), figsize=(14, 6), squeeze=False)
    width = 0.8 / len(BARS)
    for (row, model), (column, load) in product(enumerate(MODELS), enumerate(CLASSES)):
        axes = panels[row][column]
        for place, system in enumerate(BARS):
            values = [figure_of(rows, Case(system, cluster, model, load)) or 0.0 for cluster in SHOWN]
            at = np.arange(len(SHOWN)) + (place - (len(BARS) - 1) / 2) * width
            axes.bar(at, values, width, label=SYSTEMS[system].says, color=f"C{place}")
        for system, style in (("distserve", "k--"), ("ours", "k:")):
            base = figure_of(rows, Case(system, HOMOGENEOUS, model, load))
            if base:
                axes.plot(
                    [-0.5, len(SHOWN) - 0.5], [base, base], style, label=f"{SYSTEMS[system].says}, 8 H100"
                )
        axes.set_title(f"{model}, {load.upper()}", fontsize=10)
        axes.set_xticks(range(len(SHOWN)), [name.removeprefix("mixed-") for name in SHOWN])
        if column == 0:
            axes.set_ylabel("requests/s")
        if row == len(MODELS) - 1:
            axes.set_xlabel("setting")
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def plot_deadlines(rows: Rows) -> plt.Figure | None:
    """The part of the trace's requests that meet a deadline, at the rate that all systems get."""
    lines = [("distserve", HOMOGENEOUS, None), ("distserve", HOMOGENEOUS, BASE_TARGETS)]
    lines += [(s, MIXED[0], targets) for s in ("ours", "hexgen") for targets in (None, BASE_TARGETS)]
    figure, panels = subplots(1, len(MODELS), figsize=(11, 4), squeeze=False)
    drawn = False
    for axes, model in zip(panels[0], MODELS, strict=True):
        for place, (system, cluster, targets) in enumerate(lines):
            row = rows.get(online_key(Case(system, cluster, model, TRACE, targets=targets), "common"))
            if row is None:
                continue
            drawn = True
            values = [value for value in row["quantiles_s"] if value is not None]
            parts = np.linspace(0, 1, len(row["quantiles_s"]))[: len(values)]
            where = "8 H100" if cluster == HOMOGENEOUS else cluster
            style = ("-" if targets is None else "--") + f"C{place // 2}"
            name = SYSTEMS[system].says + (", for targets" if targets else "")
            axes.plot(values, 100 * parts, style, label=f"{name}, {where}")
            axes.set_title(f"{model}, {row['rate_rps']:.1f} requests/s", fontsize=10)
        axes.set_xscale("log")
        axes.set_xlabel("deadline, s")
        axes.set_ylabel("requests that meet it, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    if not drawn:
        plt.close(figure)
        return None
    return figure


def plot_assumptions(rows: Rows) -> plt.Figure | None:
    """Mean and range of the ratios in each world, the paper's figures as lines."""
    worlds = [name for name in WORLDS if ratios(rows, against_distserve("ours", name))]
    if not worlds:
        return None
    figure, panels = subplots(1, 2, figsize=(11, 0.5 * len(worlds) + 1.5), sharey=True)
    for axes, pairs, title, claim in (
        (panels[0], against_distserve, "over DistServe-like on 8 H100", 1.3),
        (panels[1], against_hexgen, "over HexGen-like, same GPUs", 1.4),
    ):
        for place, name in enumerate(worlds):
            found = spread(ratios(rows, pairs("ours", name)))
            if found:
                axes.plot([found.least, found.most], [place, place], color="C0", linewidth=2)
                axes.plot(found.mean, place, "o", color="C0")
                axes.annotate(f"{found.mean:.2f}", (found.mean, place), (0, 6), textcoords="offset points")
        axes.axvline(1.0, color="grey", linewidth=1)
        axes.axvline(claim, color="C3", linestyle="--", linewidth=1, label=f"the paper's mean, {claim}×")
        axes.set_yticks(range(len(worlds)), [WORLDS[name].says for name in worlds])
        axes.set_ylim(len(worlds) - 0.5, -0.7)
        axes.set_title(f"requests/s {title}", fontsize=10)
        axes.set_xlabel("mean, least and most of the instances")
        axes.legend(fontsize=8, loc="lower right")
    return figure


def plot_price(rows: Rows) -> plt.Figure | None:
    """The mean ratio per dollar over the H100's price, world by world."""
    known = np.linspace(1.5, 8, 100)
    figure, axes = subplots(figsize=(9, 4))
    drawn = False
    for name in WORLDS:
        found = rentals(rows, against_distserve("ours", name), PAPER_PRICE)
        if found:
            drawn = True
            axes.plot(known, [mean_per_dollar(found, price) for price in known], label=WORLDS[name].says)
    if not drawn:
        plt.close(figure)
        return None
    for price in sorted(set(H100_PRICES.values())):
        axes.axvline(price, color="grey", linewidth=0.8, linestyle=":")
        label = f"${price:.2f}"
        at = (price, axes.get_ylim()[0])
        axes.annotate(label, at, (-8, 4), textcoords="offset points", fontsize=7, rotation=90)
    for wanted in WANTED:
        axes.axhline(wanted, color="C3", linewidth=0.8, linestyle="--")
    axes.set_xlabel("USD per hour of an H100, the other types at the catalog's prices")
    axes.set_ylabel("requests per dollar, ours / DistServe-like, mean")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def plot_ablation(rows: Rows) -> plt.Figure | None:
    """Requests/s of each search over those of the paper's, instance by instance."""
    cases = [case for case in ablation_cases() if case.system == "paper"]
    found = {name: ratios(rows, between(name, "paper", cases), "planned_rps") for name in ABLATED}
    found = {name: values for name, values in found.items() if values and name != "paper"}
    if not found:
        return None
    figure, axes = subplots(figsize=(8, 4))
    axes.boxplot(list(found.values()), whis=(0, 100), tick_labels=[SYSTEMS[name].says for name in found])
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_ylabel("planned requests/s, over the paper's algorithm")
    axes.tick_params(axis="x", labelsize=8, rotation=12)
    return figure


def plot_links(rows: Rows) -> plt.Figure | None:
    """Requests/s over the speed of the links between nodes, in parts of ours at the setting's own."""
    instances = list(dict.fromkeys((case.model, case.load) for case in link_cases()))
    systems = list(dict.fromkeys(case.system for case in link_cases()))
    if figure_of(rows, Case("ours", MIXED[0], *instances[0], links=LINK_SCALES[0])) is None:
        return None
    figure, panels = subplots(1, len(instances), figsize=(3.4 * len(instances), 3.4), sharey=True)
    for axes, (model, load) in zip(panels, instances, strict=True):
        base = figure_of(rows, Case("ours", MIXED[0], model, load))
        for system in systems:
            values = [figure_of(rows, Case(system, MIXED[0], model, load, links=s)) for s in LINK_SCALES]
            if base and all(value is not None for value in values):
                axes.plot(
                    LINK_SCALES, [value / base for value in values if value], "o-", label=SYSTEMS[system].says
                )
        axes.set_xscale("log", base=4)
        axes.set_title(f"{model}, {load.upper()}", fontsize=10)
        axes.set_xlabel("speed of links, times the setting's")
    panels[0].set_ylabel("requests/s, parts of ours × 1")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    return figure
