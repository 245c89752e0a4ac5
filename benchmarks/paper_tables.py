"""Markdown tables of the evaluation, the paper's claims beside ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median

from paper_cases import (
    ABLATED,
    BASE_TARGETS,
    CHEAPER,
    CLASSES,
    HOMOGENEOUS,
    LINK_SCALES,
    LOADS,
    MIXED,
    MODELS,
    SYSTEMS,
    TARGET_SCALES,
    TRACE,
    WORLDS,
    Case,
    ablation_cases,
    link_cases,
    targets_at,
)
from paper_summary import (
    Rows,
    Spread,
    against_distserve,
    against_hexgen,
    between,
    deadline_ratios,
    figure_of,
    mean_per_dollar,
    online_key,
    price_for,
    ratios,
    rentals,
    spread,
    trace_pairs,
)

NONE = "–"
PAPER_PRICE = 3.69
H100_PRICES = {
    "the catalog's PCIe card": 2.79,
    "the paper: $29.52 for 8": PAPER_PRICE,
    "RunPod 2024, PCIe (SkyPilot's catalog v6)": 4.49,
    "RunPod 2024, SXM (SkyPilot's catalog v6)": 4.69,
}
"""USD per hour of an H100. The other types keep the catalog's prices, most of them RunPod's of 2024 too."""
WANTED = (1.3, 1.5)
"""Mean ratios over DistServe-like: the paper's, and what this project set out for."""


def report(rows: Rows) -> str:
    """All tables of which there are rows."""
    found = [(title, make(rows)) for title, make in SECTIONS.values()]
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in found if text)


def refreshed(page: str, rows: Rows) -> str:
    """A page with its tables made anew: what stands between ``<!-- paper.py: NAME -->`` and ``<!-- end -->``.

    NAME is a key of `SECTIONS`; a table of which there are no rows stays as it is. Its plot comes before it.
    """

    def table_of(match: re.Match[str]) -> str:
        title, make = SECTIONS[match["name"]]
        text = make(rows)
        if text and match["name"] in PLOTS:
            text = f"![{title}](images/paper-{PLOTS[match['name']]}.svg)\n\n{text}"
        return f"{match['head']}\n{text}\n{match['foot']}" if text else match[0]

    return re.sub(
        r"(?P<head><!-- paper\.py: (?P<name>[a-z]+) -->)\n.*?(?P<foot><!-- end -->)",
        table_of,
        page,
        flags=re.DOTALL,
    )


def claims(rows: Rows) -> str:
    """One line per claim: the paper's figure, the aim, ours in the base world and under all assumptions."""

    def column(system: str, world: str) -> list[str]:
        same = spread(ratios(rows, against_distserve(system, world)))
        cheap = spread(ratios(rows, against_distserve(system, world, [CHEAPER])))
        hexgen = spread(ratios(rows, against_hexgen(system, world)))
        late = [
            spread(deadline_ratios(rows, trace_pairs(system, other, world, targets)))
            for other, targets in product(("distserve", "hexgen"), (None, BASE_TARGETS))
        ]
        return [
            _times(same, "mean"),
            _times(same, "most"),
            _times(hexgen, "mean"),
            _times(hexgen, "most"),
            _range(cheap),
            *(_range(each) for each in late),
        ]

    names = [
        "throughput over DistServe-like on 8 H100, mean",
        "the same, most",
        "throughput over HexGen-like on the same GPUs, mean",
        "the same, most",
        "throughput at 70% of the price over DistServe-like, mean (least to most)",
        "latency deadline of DistServe-like over ours, at one rate, mean (least to most)",
        "the same, both planned for 2 s and 200 ms",
        "latency deadline of HexGen-like over ours, at one rate, mean (least to most)",
        "the same, both planned for 2 s and 200 ms",
    ]
    paper = ["1.3×", "2.0×", "1.4×", "1.5×", "about 1", *["1.5×"] * 4]
    aims = ["≥ 1.5×", "≥ 2.0×", "≥ 1.4×", NONE, "≥ 1", *[NONE] * 4]
    columns = [
        column("ours", "base"),
        column("ours-vllm", "base"),
        column("paper", "base"),
        column("ours", "all"),
    ]
    head = ["claim", "paper", "aim", "ours (any)", "ours (vllm)", "the paper's algorithm", "ours, world `all`"]
    return table(head, list(zip(names, paper, aims, *columns, strict=True)))


def throughput(rows: Rows) -> str:
    """One line per cluster and model, one column per load; every system's simulated requests/s."""
    lines = []
    for model, cluster in product(MODELS, (HOMOGENEOUS, *MIXED, CHEAPER)):
        for system in ("distserve", "ours", "ours-vllm", "paper", "hexgen", "colocated"):
            shown = [figure_of(rows, Case(system, cluster, model, load)) for load in LOADS]
            if any(shown):
                lines.append([model, cluster, SYSTEMS[system].says, *(_number(value) for value in shown)])
    return table(["model", "cluster", "system", *LOADS], lines)


def promises(rows: Rows) -> str:
    """One line per system: what its plans reach at saturation of the rate they promise."""
    lines = []
    for system in ("distserve", "ours", "ours-vllm", "paper", "hexgen", "colocated"):
        cases = product((HOMOGENEOUS, *MIXED, CHEAPER), MODELS, LOADS)
        found = [
            kept for cluster, model, load in cases if (kept := _kept(rows, Case(system, cluster, model, load)))
        ]
        if found:
            within = sum(0.95 <= kept <= 1.05 for kept in found)
            shown = [f"{100 * (value - 1):+.1f}%" for value in (median(found), min(found), max(found))]
            lines.append([SYSTEMS[system].says, len(found), f"{within} of {len(found)}", *shown])
    return table(["system", "plans", "within 5%", "median", "least", "most"], lines)


def _kept(rows: Rows, case: Case) -> float | None:
    """The simulated part of the planned rate; None without a plan."""
    planned, found = (figure_of(rows, case, figure) for figure in ("planned_rps", "rps"))
    return found / planned if found and planned else None


def assumptions(rows: Rows) -> str:
    """One line per world."""
    lines = []
    for name, world in WORLDS.items():
        found = [
            spread(ratios(rows, against_distserve("ours", name))),
            spread(ratios(rows, against_hexgen("ours", name))),
            spread(ratios(rows, against_distserve("ours", name, [CHEAPER]))),
            spread(ratios(rows, against_distserve("ours", name, [HOMOGENEOUS]))),
        ]
        if found[0]:
            lines.append([f"`{name}`", world.says, *(_range(each) for each in found)])
    head = ["world", "assumes", "over DistServe-like", "over HexGen-like", "at 70% of the price"]
    return table([*head, "ours on the 8 H100 over DistServe-like"], lines)


def prices(rows: Rows) -> str:
    """The mean ratio per dollar at some prices of an H100, and the prices from which it is what was claimed."""
    lines = []
    for name in WORLDS:
        found = rentals(rows, against_distserve("ours", name), PAPER_PRICE)
        if found:
            shown = [f"{mean_per_dollar(found, price):.2f}" for price in H100_PRICES.values()]
            needed = [price_for(found, wanted) for wanted in WANTED]
            lines.append(
                [f"`{name}`", *shown, *(NONE if price is None else f"${price:.2f}" for price in needed)]
            )
    head = [f"${price:.2f} ({name})" for name, price in H100_PRICES.items()]
    return table(["world", *head, *(f"price for {wanted}×" for wanted in WANTED)], lines)


def goodput(rows: Rows) -> str:
    """One line per pair of latency targets."""
    lines = []
    for scale in TARGET_SCALES:
        targets = targets_at(scale)
        found = [
            spread(ratios(rows, against_distserve("ours", targets=targets), "goodput_rps")),
            spread(
                ratios(rows, against_distserve("ours", clusters=[HOMOGENEOUS], targets=targets), "goodput_rps")
            ),
            spread(ratios(rows, against_hexgen("ours", targets=targets), "goodput_rps")),
        ]
        if found[0]:
            lines.append([f"{targets[0]:g} s, {1000 * targets[1]:g} ms", *(_range(each) for each in found)])
    head = ["TTFT, TPOT", "mixed over DistServe-like", "ours on the 8 H100 over DistServe-like"]
    return table([*head, "over HexGen-like"], lines)


def latencies(rows: Rows) -> str:
    """One line per system on its cluster: latencies of the trace at the rate that all systems get."""
    lines = []
    for model, cluster in product(MODELS, (HOMOGENEOUS, *MIXED, CHEAPER)):
        shown = product(
            ("distserve", "ours", "ours-vllm", "paper", "hexgen", "colocated"), (None, BASE_TARGETS)
        )
        for system, targets in shown:
            row = rows.get(online_key(Case(system, cluster, model, TRACE, targets=targets), "common"))
            if row:
                figures = [_seconds(value) for value in (row["mean_s"], row["p99_s"], *row["deadlines_s"])]
                name = SYSTEMS[system].says + (", for targets" if targets else "")
                lines.append([model, cluster, name, f"{row['rate_rps']:.2f}", *figures])
    head = ["model", "cluster", "system", "req/s", "mean, s", "P99, s", "met by 90%, s", "95%", "99%"]
    return table(head, lines)


def budgets(rows: Rows) -> str:
    """What is rented for the paper's price, and for 70% of it, beside DistServe-like on the 8 H100."""
    lines = []
    for model, load in product(MODELS, CLASSES):
        row = rows.get(f"budget/{model}/{load}")
        base = figure_of(rows, Case("distserve", HOMOGENEOUS, model, load))
        if row is None or not base:
            continue
        for mix in (row["full"], row["less"]):
            if mix:
                gpus = " + ".join(f"{count} {gpu}" for gpu, count in mix["gpus"].items())
                shown = [
                    gpus,
                    mix["roles"],
                    f"${mix['price']:.2f}",
                    _number(mix["rps"]),
                    f"{mix['rps'] / base:.2f}×",
                ]
                lines.append([model, load, *shown])
    return table(["model", "load", "rented", "groups", "per hour", "req/s", "over DistServe-like"], lines)


def ablations(rows: Rows) -> str:
    """The paper's search, and ours, over what is left when a part is taken away."""
    cases = [case for case in ablation_cases() if case.system == "paper"]
    lines = []
    for first in ("paper", "ours"):
        for second in ABLATED:
            found = [
                spread(ratios(rows, between(first, second, cases), figure)) for figure in ("planned_rps", "rps")
            ]
            if first != second and found[0] and (first == "paper") == (second not in ("ours", "disaggregated")):
                shown = [_range(each) for each in found]
                lines.append([SYSTEMS[first].says, SYSTEMS[second].says, found[0].runs, *shown])
    if (found := spread(ratios(rows, between("ours", "paper", cases), "planned_rps"))) is not None:
        measured = spread(ratios(rows, between("ours", "paper", cases)))
        lines.append([SYSTEMS["ours"].says, SYSTEMS["paper"].says, found.runs, _range(found), _range(measured)])
    return table(["of", "over", "instances", "planned: mean (least to most)", "simulated"], lines)


def links(rows: Rows) -> str:
    """One line per system and instance, requests/s by the speed of all links between nodes."""
    lines = []
    for case in dict.fromkeys((case.system, case.model, case.load) for case in link_cases()):
        system, model, load = case
        shown = [figure_of(rows, Case(system, MIXED[0], model, load, links=scale)) for scale in LINK_SCALES]
        if sum(value is not None for value in shown) > 1:
            lines.append([model, load, SYSTEMS[system].says, *(_number(value) for value in shown)])
    return table(["model", "load", "system", *(f"links × {scale:g}" for scale in LINK_SCALES)], lines)


SECTIONS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "claims": ("The paper's claims", claims),
    "throughput": ("Saturation throughput, requests/s", throughput),
    "promises": ("What plans keep of their promises", promises),
    "assumptions": ("Which assumption decides", assumptions),
    "prices": ("The H100's price", prices),
    "goodput": ("Under latency targets", goodput),
    "latencies": ("The online trace at 75% of the peak", latencies),
    "budgets": ("GPUs chosen by `budget`", budgets),
    "ablations": ("Ablations", ablations),
    "links": ("Faster and slower links", links),
}
"""Titles and makers of the tables, by the name that pages call them."""
PLOTS = {
    "throughput": "throughput",
    "assumptions": "assumptions",
    "prices": "price",
    "latencies": "deadlines",
    "ablations": "ablation",
    "links": "links",
}
"""The plot (of paper_plots) that shows what a table says."""


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table; nothing without lines."""
    if not lines:
        return ""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _times(found: Spread | None, part: str) -> str:
    return NONE if found is None else f"{getattr(found, part):.2f}×"


def _range(found: Spread | None) -> str:
    return NONE if found is None else f"{found.mean:.2f}× ({found.least:.2f} to {found.most:.2f})"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"
