"""A plan as a picture: prefill groups left, decode groups right, KV routes as wide as their share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hexgen2.report.words import layout_words, nodes_words
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Group, Plan, Role

_COLOURS: dict[Role, tuple[str, str]] = {  # fill, edge
    "prefill": ("#fde8d4", "#c2620c"),
    "decode": ("#dbe9f9", "#1f5fa8"),
    "colocated": ("#e2f1e1", "#2f7d32"),
}
_SIDES: tuple[Role, Role] = ("prefill", "decode")
_BOX_WIDTH, _BOX_HEIGHT, _GAP = 4.3, 1.1, 0.3
_COLUMN_X = {"prefill": 0.0, "decode": 7.6, "colocated": 3.8}


def save_picture(plan: Plan, path: str | Path) -> None:
    """Write the picture; the suffix (.svg, .png or .pdf) decides its format."""
    save_figure(path, lambda figure: _draw(figure, plan))


def save_figure(path: str | Path, draw: Callable[[Any], None]) -> None:
    """Have a matplotlib figure drawn and write it; the suffix (.svg, .png or .pdf) decides its format."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png", ".pdf"):
        raise InputError(
            str(path), "", f"cannot draw a {suffix or 'file without suffix'}", "end the name in .svg or .png"
        )
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without a fixed salt and date the same plan gives other bytes at every call.
    style = {"svg.hashsalt": "hexgen2", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        metadata: dict[str, Any] = {"Date": None} if suffix == ".svg" else {}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110, metadata=metadata)
        except OSError as error:
            raise InputError(
                str(path), "", f"cannot be written ({error.strerror})", "give another path"
            ) from None


def _draw(figure: Any, plan: Plan) -> None:
    columns = {role: plan.role_groups(role) for role in _SIDES}
    single = plan.role_groups("colocated")
    rows = max(len(column) for column in columns.values())
    step = _BOX_HEIGHT + _GAP
    height = (rows + len(single)) * step + 1.9
    figure.set_size_inches(12.2, height * 0.82)
    axes = figure.add_subplot()
    axes.set_xlim(-0.2, 12.1)
    axes.set_ylim(-height + 1.2, 0.9)
    axes.axis("off")

    places: dict[str, tuple[float, float]] = {}
    for role, groups in columns.items():
        top = (rows - len(groups)) * step / 2
        for place, group in enumerate(groups):
            places[group.id] = (_COLUMN_X[role], -(top + place * step) - _BOX_HEIGHT)
    for place, group in enumerate(single):
        places[group.id] = (_COLUMN_X["colocated"], -(rows + place) * step - _BOX_HEIGHT)

    for route in sorted(plan.routes, key=lambda route: -route.share):
        _draw_route(axes, places[route.source], places[route.target], route.share)
    _label_routes(axes, plan, places)
    for group in plan.groups:
        _draw_group(axes, plan, group, *places[group.id])

    objective = f"{plan.objective.value:.3g} {plan.objective.unit}"
    axes.text(
        -0.1,
        0.62,
        f"{plan.model}, workload {plan.workload}: {objective} at ${plan.price_per_hour:.2f}/h",
        fontsize=13,
        fontweight="bold",
        va="center",
    )
    for role in _SIDES:
        if columns[role]:
            axes.text(
                _COLUMN_X[role] + _BOX_WIDTH / 2, 0.18, role, ha="center", va="center", color=_COLOURS[role][1]
            )
    axes.text(
        -0.1,
        -height + 1.35,
        f"bottleneck: {plan.bottleneck.text}",
        fontsize=9,
        color="#444444",
        va="bottom",
        wrap=True,
    )


def _draw_group(axes: Any, plan: Plan, group: Group, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill, edge = _COLOURS[group.role]
    box = FancyBboxPatch(
        (x, y), _BOX_WIDTH, _BOX_HEIGHT, boxstyle="round,pad=0,rounding_size=0.08", fc=fill, ec=edge, lw=1.4
    )
    axes.add_patch(box)
    load = group.share * plan.throughput_rps
    batch = "" if group.role == "prefill" else f", batch {group.max_batch}"
    layout, size = _wrapped_layout(layout_words(plan, group))
    lines = (
        (f"{group.id}   {load:.3g} of {group.capacity_rps:.3g} req/s{batch}", 10, "#111111", "bold", 0.17),
        (layout, size, "#111111", "normal", 0.53 if "\n" in layout else 0.46),
        (_shorten(nodes_words(group)), 8, "#555555", "normal", 0.87 if "\n" in layout else 0.75),
    )
    for text, fontsize, colour, weight, down in lines:
        top = y + _BOX_HEIGHT * (1 - down)
        axes.text(
            x + 0.12,
            top,
            text,
            fontsize=fontsize,
            color=colour,
            fontweight=weight,
            va="center",
            linespacing=1.15,
        )


def _wrapped_layout(words: str, width: int = 60) -> tuple[str, float]:
    """The layout on one line, or on two that break at an arrow; and the font size at which it fits the box."""
    if len(words) <= width:
        return words, 8.5
    stages = words.split(" → ")
    middle = min(range(1, len(stages) + 1), key=lambda cut: _longest(stages, cut))
    lines = [" → ".join(stages[:middle]) + " →", " → ".join(stages[middle:])]
    return "\n".join(lines), min(8.5, 8.5 * width / max(map(len, lines)))


def _longest(stages: list[str], cut: int) -> int:
    return max(len(" → ".join(stages[:cut])), len(" → ".join(stages[cut:])))


def _draw_route(axes: Any, source: tuple[float, float], target: tuple[float, float], share: float) -> None:
    axes.plot(
        (source[0] + _BOX_WIDTH, target[0]),
        (source[1] + _BOX_HEIGHT / 2, target[1] + _BOX_HEIGHT / 2),
        lw=1 + 14 * share,
        color="#8a8a8a",
        alpha=0.5,
        solid_capstyle="butt",
        zorder=0,
    )


def _label_routes(axes: Any, plan: Plan, places: dict[str, tuple[float, float]]) -> None:
    """Labels stand at growing distances along their arrows, so that crossing routes keep theirs apart."""
    outgoing: dict[str, int] = {}
    for route in plan.routes:
        order = outgoing.get(route.source, 0)
        outgoing[route.source] = order + 1
        along = 0.22 + 0.17 * (order % 4)
        (x0, y0), (x1, y1) = places[route.source], places[route.target]
        x = x0 + _BOX_WIDTH + along * (x1 - x0 - _BOX_WIDTH)
        y = y0 + along * (y1 - y0) + _BOX_HEIGHT / 2
        axes.text(
            x,
            y,
            f"{route.share:.0%}",
            fontsize=8,
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
        )


def _shorten(text: str, limit: int = 62) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
