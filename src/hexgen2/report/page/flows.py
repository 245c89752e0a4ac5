"""Where requests go: prefill groups left, decode groups right, ribbons as wide as the share of all requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen2.report.page.markup import Markup, element, picture, shortened
from hexgen2.report.words import alike, gpus_words, ids_words
from hexgen2.specs.plan import Group, Plan, Role

WIDTH, BOX = 380.0, 146.0
LEAST = 42.0
"""Least height of a box: two lines of text."""
WHOLE = 170.0
"""Height of all requests."""
GAP, HEADING, EDGE = 10.0, 22.0, 2.0
LABELLED = 0.06
"""Share from which a ribbon is wide enough for its figure."""
ARROW: tuple[Role, Role] = ("prefill", "decode")


@dataclass(frozen=True)
class Box:
    """Alike groups at a place."""

    groups: Sequence[Group]
    x: float
    y: float
    height: float

    @property
    def share(self) -> float:
        return sum(group.share for group in self.groups)


def flows_svg(plan: Plan) -> Markup:
    """The picture; alike groups are one box."""
    classes: dict[Role, list[list[Group]]] = {"prefill": [], "decode": [], "colocated": []}
    for groups in alike(plan):
        classes[groups[0].role].append(groups)
    tall = max(_column_height(classes[role]) for role in ARROW)
    boxes: list[Box] = []
    texts: list[Markup] = []
    below = 0.0
    if tall:
        for role, x in (("prefill", EDGE), ("decode", WIDTH - BOX - EDGE)):
            column = classes["prefill" if role == "prefill" else "decode"]
            texts.append(_heading(role, x + BOX / 2, HEADING - 8))
            boxes += _stacked(column, x, HEADING + (tall - _column_height(column)) / 2)
        below = HEADING + tall + GAP
    if classes["colocated"]:
        texts.append(_heading("colocated: both phases in one place", WIDTH / 2, below + HEADING - 8))
        boxes += _stacked(classes["colocated"], (WIDTH - BOX) / 2, below + HEADING)
        below += HEADING + _column_height(classes["colocated"]) + GAP
    ribbons, labels = _ribbons(plan, boxes)
    drawn = [_drawn(plan, box) for box in boxes]
    return picture(
        WIDTH, below - GAP + EDGE, "Where requests go", description(plan), [*ribbons, *drawn, *labels, *texts]
    )


def description(plan: Plan) -> str:
    """The picture in words."""
    routes = [f"{route.source} to {route.target} {route.share:.0%}" for route in plan.routes]
    alone = [f"{group.id} {group.share:.0%}" for group in plan.role_groups("colocated")]
    parts = []
    if routes:
        parts.append(f"Routes from prefill to decode groups by share of all requests: {', '.join(routes)}.")
    if alone:
        parts.append(f"Colocated groups serve both phases: {', '.join(alone)}.")
    return " ".join(parts)


def _column_height(classes: Sequence[Sequence[Group]]) -> float:
    return sum(map(_height, classes)) + GAP * max(0, len(classes) - 1)


def _height(groups: Sequence[Group]) -> float:
    return max(LEAST, WHOLE * sum(group.share for group in groups))


def _stacked(classes: Sequence[Sequence[Group]], x: float, y: float) -> list[Box]:
    boxes: list[Box] = []
    for groups in classes:
        boxes.append(Box(groups, x, y, _height(groups)))
        y += boxes[-1].height + GAP
    return boxes


def _heading(text: str, x: float, y: float) -> Markup:
    return element("text", text, x=x, y=y, class_="heading", text_anchor="middle")


def _drawn(plan: Plan, box: Box) -> Markup:
    first = box.groups[0]
    middle = box.y + box.height / 2
    many = f"{len(box.groups)} × (" if len(box.groups) > 1 else ""
    gpus = f"{many}{gpus_words(plan, first)}{')' if many else ''}"
    return element(
        "g",
        element("rect", x=box.x, y=box.y, width=BOX, height=box.height, rx=5),
        element(
            "text",
            shortened(f"{ids_words(box.groups)} · {box.share:.0%}", BOX - 14, 13.5),
            x=box.x + 8,
            y=middle - 4,
            class_="name",
        ),
        element("text", shortened(gpus, BOX - 14, 11.5), x=box.x + 8, y=middle + 12),
        class_=f"box {first.role}",
    )


def _ribbons(plan: Plan, boxes: Sequence[Box]) -> tuple[list[Markup], list[Markup]]:
    """The ribbons and their figures; at each box they leave in the order of the boxes that they lead to."""
    place = {group.id: at for at, box in enumerate(boxes) for group in box.groups}
    shares: dict[tuple[int, int], float] = {}
    for route in plan.routes:
        ends = place[route.source], place[route.target]
        shares[ends] = shares.get(ends, 0.0) + route.share
    leaving = {at: box.y + (box.height - WHOLE * box.share) / 2 for at, box in enumerate(boxes)}
    arriving = dict(leaving)
    ribbons: list[Markup] = []
    labels: list[Markup] = []
    for (a, b), share in sorted(shares.items()):
        thick = WHOLE * share
        x0, x1 = boxes[a].x + BOX, boxes[b].x
        y0, y1 = leaving[a] + thick / 2, arriving[b] + thick / 2
        leaving[a] += thick
        arriving[b] += thick
        middle = (x0 + x1) / 2
        path = f"M{x0:.1f} {y0:.1f}C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
        ribbons.append(element("path", d=path, class_="ribbon", stroke_width=max(1.0, thick)))
        if share >= LABELLED:
            text = f"{share:.0%}"
            labels.append(element("text", text, x=x0 + 5, y=y0 + 4, class_="figure"))
    return ribbons, labels
