"""Where requests go: prefill groups left, decode groups right, ribbons as wide as the share of all requests.

For a plan, or for a service that runs: then the planned ribbons are pale, and what really went that way lies on
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hexgen2.report.page.markup import Markup, element, picture, shortened
from hexgen2.report.words import alike, gpus_words, runs_words
from hexgen2.specs.plan import Plan, Role

WIDTH, BOX = 380.0, 146.0
LEAST, LINE = 42.0, 15.0
"""Least height of a box: two lines of text; and of one line more, for what was measured."""
WHOLE = 170.0
"""Height of all requests."""
GAP, HEADING, EDGE = 10.0, 22.0, 2.0
LABELLED = 0.06
"""Share from which a ribbon is wide enough for its figure."""
ARROW: tuple[Role, Role] = ("prefill", "decode")
Ends = tuple[str, str]


@dataclass(frozen=True)
class Station:
    """Groups that are alike, with their part of all requests and what is to be said of each."""

    ids: tuple[str, ...]
    role: Role
    share: float
    words: str


@dataclass(frozen=True)
class Measured:
    """What really happens: parts of all requests by route and by colocated group, and groups that are down.
    ``idle``: too few requests to tell."""

    routes: Mapping[Ends, float] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    down: frozenset[str] = frozenset()
    idle: bool = False

    def share(self, station: Station) -> float:
        """The station's part of all requests."""
        ids, end = set(station.ids), 0 if station.role == "prefill" else 1
        through = sum(share for ends, share in self.routes.items() if ends[end] in ids)
        return through + sum(share for group, share in self.alone.items() if group in ids)


@dataclass(frozen=True)
class Box:
    """A station at a place."""

    station: Station
    x: float
    y: float
    height: float

    @property
    def share(self) -> float:
        return self.station.share


def flows_svg(plan: Plan, measured: Measured | None = None) -> Markup:
    """The picture of a plan; alike groups are one box."""
    return flows_picture(stations_of(plan), _shares(plan), measured)


def stations_of(plan: Plan) -> list[Station]:
    """A plan's groups, alike ones together."""
    found = []
    for groups in alike(plan):
        gpus = gpus_words(plan, groups[0])
        words = f"{len(groups)} × ({gpus})" if len(groups) > 1 else gpus
        ids, share = tuple(group.id for group in groups), sum(group.share for group in groups)
        found.append(Station(ids, groups[0].role, share, words))
    return found


def flows_picture(
    stations: Sequence[Station], routes: Mapping[Ends, float], measured: Measured | None = None
) -> Markup:
    """The picture of stations and the shares of the routes between their groups."""
    columns: dict[Role, list[Station]] = {"prefill": [], "decode": [], "colocated": []}
    for station in stations:
        columns[station.role].append(station)
    least = LEAST if measured is None else LEAST + LINE
    tall = max(_column_height(columns[role], least) for role in ARROW)
    boxes: list[Box] = []
    texts: list[Markup] = []
    below = 0.0
    if tall:
        for role, x in ((ARROW[0], EDGE), (ARROW[1], WIDTH - BOX - EDGE)):
            texts.append(_heading(role, x + BOX / 2, HEADING - 8))
            top = HEADING + (tall - _column_height(columns[role], least)) / 2
            boxes += _stacked(columns[role], x, top, least)
        below = HEADING + tall + GAP
    if columns["colocated"]:
        texts.append(_heading("colocated: both phases in one place", WIDTH / 2, below + HEADING - 8))
        boxes += _stacked(columns["colocated"], (WIDTH - BOX) / 2, below + HEADING, least)
        below += HEADING + _column_height(columns["colocated"], least) + GAP
    ribbons, labels = _ribbons(boxes, routes, measured)
    drawn = [_drawn(box, measured) for box in boxes]
    words = _description(stations, routes, measured)
    return picture(WIDTH, below - GAP + EDGE, "Where requests go", words, [*ribbons, *drawn, *labels, *texts])


def _shares(plan: Plan) -> dict[Ends, float]:
    return {(route.source, route.target): route.share for route in plan.routes}


def _description(stations: Sequence[Station], routes: Mapping[Ends, float], measured: Measured | None) -> str:
    """The picture in words."""
    told = measured is not None and not measured.idle

    def words(name: str, share: float, now: float) -> str:
        return f"{name} {share:.0%}{f' (now {now:.0%})' if told else ''}"

    ways = [
        words(f"{source} to {target}", share, measured.routes.get((source, target), 0.0) if measured else 0.0)
        for (source, target), share in routes.items()
    ]
    alone = [
        words(runs_words(station.ids), station.share, measured.share(station) if measured else 0.0)
        for station in stations
        if station.role == "colocated"
    ]
    parts = []
    if ways:
        parts.append(f"Routes from prefill to decode groups by share of all requests: {', '.join(ways)}.")
    if alone:
        parts.append(f"Colocated groups serve both phases: {', '.join(alone)}.")
    if measured and measured.down:
        parts.append(f"Down: {', '.join(sorted(measured.down))}.")
    return " ".join(parts)


def _column_height(stations: Sequence[Station], least: float) -> float:
    return sum(_height(station, least) for station in stations) + GAP * max(0, len(stations) - 1)


def _height(station: Station, least: float) -> float:
    return max(least, WHOLE * station.share)


def _stacked(stations: Sequence[Station], x: float, y: float, least: float) -> list[Box]:
    boxes: list[Box] = []
    for station in stations:
        boxes.append(Box(station, x, y, _height(station, least)))
        y += boxes[-1].height + GAP
    return boxes


def _heading(text: str, x: float, y: float) -> Markup:
    return element("text", text, x=x, y=y, class_="heading", text_anchor="middle")


def _drawn(box: Box, measured: Measured | None) -> Markup:
    station = box.station
    lines, share, lost = [station.words], box.share, 0
    if measured is not None:
        lost = len(measured.down.intersection(station.ids))
        if lost:
            lines = ["down" if len(station.ids) == 1 else f"{lost} of {len(station.ids)} down"]
        lines.append(f"plan {share:.0%}")
        share = 0.0 if measured.idle else measured.share(station)
    middle = box.y + box.height / 2 - LINE / 2 * (len(lines) - 1)
    name = f"{runs_words(station.ids)} · {share:.0%}"
    return element(
        "g",
        element("rect", x=box.x, y=box.y, width=BOX, height=box.height, rx=5),
        element("text", shortened(name, BOX - 14, 13.5), x=box.x + 8, y=middle - 4, class_="name"),
        *(
            element("text", shortened(line, BOX - 14, 11.5), x=box.x + 8, y=middle + 12 + LINE * place)
            for place, line in enumerate(lines)
        ),
        class_=f"box {station.role}{' down' if lost else ''}",
    )


def _ribbons(
    boxes: Sequence[Box], routes: Mapping[Ends, float], measured: Measured | None
) -> tuple[list[Markup], list[Markup]]:
    """The ribbons and their figures; at each box they leave in the order of the boxes that they lead to."""
    place = {group: at for at, box in enumerate(boxes) for group in box.station.ids}
    shares: dict[tuple[int, int], float] = {}
    real: dict[tuple[int, int], float] = {}
    for (source, target), share in routes.items():
        ends = place[source], place[target]
        shares[ends] = shares.get(ends, 0.0) + share
        if measured is not None:
            real[ends] = real.get(ends, 0.0) + measured.routes.get((source, target), 0.0)
    leaving = {at: box.y + (box.height - WHOLE * box.share) / 2 for at, box in enumerate(boxes)}
    arriving = dict(leaving)
    ribbons: list[Markup] = []
    above: list[Markup] = []
    labels: list[Markup] = []
    for (a, b), share in sorted(shares.items()):
        thick = WHOLE * share
        x0, x1 = boxes[a].x + BOX, boxes[b].x
        y0, y1 = leaving[a] + thick / 2, arriving[b] + thick / 2
        leaving[a] += thick
        arriving[b] += thick
        middle = (x0 + x1) / 2
        path = f"M{x0:.1f} {y0:.1f}C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
        pale = "" if measured is None else " planned"
        ribbons.append(element("path", d=path, class_=f"ribbon{pale}", stroke_width=max(1.0, thick)))
        now = real.get((a, b), 0.0)
        if now > 0:
            above.append(element("path", d=path, class_="ribbon real", stroke_width=max(1.0, WHOLE * now)))
        shown = share if measured is None or measured.idle else now
        if max(share, shown) >= LABELLED:
            labels.append(element("text", f"{shown:.0%}", x=x0 + 5, y=y0 + 4, class_="figure"))
    return [*ribbons, *above], labels
