"""The plan over the network: nodes with their GPUs by role, and the links that KV caches and pipelines cross.

Nodes stand in two columns, so that names never overlap however many there are; links curve between them, as
wide as the bytes per second on them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hexgen2.report.page.markup import Markup, element, picture, shortened
from hexgen2.report.reasons import FULL, rate_words
from hexgen2.specs.plan import Group, LinkLoad, Plan

WIDTH, BOX = 380.0, 138.0
SQUARE, ROW = 11.0, 8
"""Side of a GPU's square with its gap, and squares in a row."""
HEAD = 34.0
"""Height of a node's name and its GPUs' type."""
NAME, TEXT = 13.5, 11.5
"""Sizes of a name (bold, so counted larger than it is) and of other text."""
GAP, EDGE = 18.0, 3.0
WIDEST, THINNEST = 12.0, 1.2
FEW_LINKS = 12
"""Links that may be as wide as that; more are thinner."""
MOST_NODES = 24
"""Nodes drawn: those in use, the ones with most KV traffic first."""
MOST_LABELS = 14
PORT_MARGIN = 8.0
"""Distance of links from a box's corners."""
LABEL = (62.0, 14.0)
"""Width and height that a link's figure takes."""


@dataclass(frozen=True)
class Place:
    """A node's box; ``left``: in the left column."""

    x: float
    y: float
    height: float
    left: bool

    @property
    def port(self) -> tuple[float, float]:
        """Where links meet the box: the middle of its inner side."""
        return (self.x + BOX if self.left else self.x, self.y + self.height / 2)


def network_svg(plan: Plan, measured: Sequence[LinkLoad] | None = None, down: Collection[str] = ()) -> Markup:
    """The picture. ``measured``: what the plan's links really carry; the nodes keep their places by plan then.
    GPUs of the groups that are ``down`` are marked."""
    loads = plan.links if measured is None else measured
    looks = _looks(plan, down)
    nodes = nodes_shown(plan)
    places, height = _placed(plan, nodes)
    links = [link for link in loads if link.source in places and link.target in places]
    most = max((link.bytes_per_s for link in (*plan.links, *links)), default=1.0)
    pipelines = sorted({ends for group in plan.groups for ends in _steps(group) if set(ends) <= set(places)})
    paths = [_pipeline(places, a, b) for a, b in pipelines]
    drawn, labels = _links(places, links, most)
    boxes = [_node(plan, name, places[name], looks) for name in nodes]
    arrow = element(
        "defs",
        *(
            element(
                "marker",
                element("path", d="M0 0L6 3L0 6z", class_=f"head{kind}"),
                id=f"head{kind}",
                viewBox="0 0 6 6",
                refX=5,
                refY=3,
                markerWidth=9,
                markerHeight=9,
                markerUnits="userSpaceOnUse",
                orient="auto",
            )
            for kind in ("", "-full")
        ),
    )
    return picture(
        WIDTH,
        height,
        "The plan over the network",
        description(plan, nodes, loads),
        [arrow, *paths, *drawn, *boxes, *labels],
    )


def description(plan: Plan, nodes: Sequence[str], loads: Sequence[LinkLoad]) -> str:
    """The picture in words."""
    parts = [f"{len(nodes)} of {len(plan.cluster.nodes)} nodes, each GPU coloured by the role of its group."]
    if busy := [link for link in loads if link.bytes_per_s > 0]:
        words = [
            f"{link.source} to {link.target} {rate_words(link.bytes_per_s)} ({link.use:.0%} in use)"
            for link in busy[:MOST_LABELS]
        ]
        parts.append(f"KV caches on links: {', '.join(words)}.")
    else:
        parts.append("No KV cache crosses a link.")
    return " ".join(parts)


def _looks(plan: Plan, down: Collection[str]) -> dict[str, str]:
    """GPU → the class of its square."""
    return {
        gpu: f"{group.role}{' down' if group.id in down else ''}" for group in plan.groups for gpu in group.gpus
    }


def _node_of(gpu: str) -> str:
    return gpu.rsplit("/", 1)[0]


def nodes_shown(plan: Plan) -> list[str]:
    """Nodes in use in the cluster's order, at most `MOST_NODES`."""
    traffic: dict[str, float] = {_node_of(gpu): 0.0 for group in plan.groups for gpu in group.gpus}
    for link in plan.links:
        for end in (link.source, link.target):
            traffic[end] = traffic.get(end, 0.0) + link.bytes_per_s
    names = [node.name for node in plan.cluster.nodes]
    kept = sorted((name for name in names if name in traffic), key=lambda name: -traffic[name])[:MOST_NODES]
    return [name for name in names if name in kept]


def _placed(plan: Plan, nodes: Sequence[str]) -> tuple[dict[str, Place], float]:
    """Two columns: nodes that rather send KV caches left, those that rather receive right, evened out."""
    sent = dict.fromkeys(nodes, 0.0)
    for link in plan.links:
        for end, sign in ((link.source, 1.0), (link.target, -1.0)):
            if end in sent:
                sent[end] += sign * (link.bytes_per_s or 1.0)
    ranked = sorted(nodes, key=lambda name: -sent[name])
    left = set(ranked[: (len(ranked) + 1) // 2])
    counts = {node.name: node.count for node in plan.cluster.nodes}
    bottoms = {True: EDGE, False: EDGE}
    places: dict[str, Place] = {}
    for name in nodes:
        side = name in left
        height = HEAD + SQUARE * -(-counts[name] // ROW) + 12
        places[name] = Place(EDGE if side else WIDTH - BOX - EDGE, bottoms[side], height, side)
        bottoms[side] += height + GAP
    return places, max(bottoms.values()) - GAP + EDGE


def _steps(group: Group) -> Iterator[tuple[str, str]]:
    """Pairs of nodes that a group's activations cross: from stage to stage, and inside stages over several."""
    for stage in group.stages:
        nodes = list(dict.fromkeys(map(_node_of, stage.gpus)))
        yield from ((min(a, b), max(a, b)) for a, b in pairwise(nodes))
    for first, second in pairwise(group.stages):
        a, b = _node_of(first.gpus[-1]), _node_of(second.gpus[0])
        if a != b:
            yield min(a, b), max(a, b)


def _ports(places: dict[str, Place], links: Sequence[LinkLoad]) -> dict[tuple[str, str, str], float]:
    """(node, source, target) → how far from the middle of the node's side the link meets it.

    Links meet a node in the order of the heights that they come from, so that they cross less.
    """
    offsets: dict[tuple[str, str, str], float] = {}
    for name, place in places.items():
        mine = [link for link in links if name in (link.source, link.target)]
        mine.sort(key=lambda link: places[link.target if link.source == name else link.source].port[1])
        room = place.height - 2 * PORT_MARGIN
        for order, link in enumerate(mine):
            offset = room * ((order + 0.5) / len(mine) - 0.5)
            offsets[name, link.source, link.target] = offset
    return offsets


def _curve(a: Place, b: Place, from_a: float = 0.0, from_b: float = 0.0) -> tuple[tuple[float, float], ...]:
    """The four points of a Bézier curve between the inner sides of two boxes, so far from their middles."""
    (x0, y0), (x1, y1) = a.port, b.port
    y0, y1 = y0 + from_a, y1 + from_b
    if a.left == b.left:
        bulge = (26 + 0.12 * abs(y1 - y0)) * (1 if a.left else -1)
        return ((x0, y0), (x0 + bulge, y0), (x1 + bulge, y1), (x1, y1))
    middle = (x0 + x1) / 2
    return ((x0, y0), (middle, y0), (middle, y1), (x1, y1))


def _path(points: Sequence[tuple[float, float]]) -> str:
    (x0, y0), *rest = points
    return f"M{x0:.1f} {y0:.1f}C" + " ".join(f"{x:.1f} {y:.1f}" for x, y in rest)


def _at(points: Sequence[tuple[float, float]], t: float) -> tuple[float, float]:
    """The point of a Bézier curve at t in 0..1."""
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    return (
        sum(w * x for w, (x, _) in zip(weights, points, strict=True)),
        sum(w * y for w, (_, y) in zip(weights, points, strict=True)),
    )


def _pipeline(places: dict[str, Place], a: str, b: str) -> Markup:
    return element("path", d=_path(_curve(places[a], places[b])), class_="pipeline")


def _links(
    places: dict[str, Place], links: Sequence[LinkLoad], most: float
) -> tuple[list[Markup], list[Markup]]:
    """Curves as wide as what they carry, ``most`` bytes/s the widest, and the figures of the busiest where
    there is room for them."""
    widest = WIDEST * min(1.0, FEW_LINKS / max(1, len(links))) ** 0.5
    drawn: list[Markup] = []
    labels: list[Markup] = []
    taken: list[tuple[float, float]] = []
    ports = _ports(places, links)
    for link in sorted(links, key=lambda link: -link.bytes_per_s):
        ends = (ports[end, link.source, link.target] for end in (link.source, link.target))
        points = _curve(places[link.source], places[link.target], *ends)
        full = "-full" if link.use >= FULL else ""
        drawn.append(
            element(
                "path",
                d=_path(points),
                class_=f"link{full}",
                stroke_width=max(THINNEST, widest * link.bytes_per_s / (most or 1.0)),
                marker_end=f"url(#head{full})",
            )
        )
        if link.bytes_per_s <= 0:
            continue
        spots = [_between(_at(points, t)) for t in (0.5, 0.35, 0.65, 0.25, 0.75)]
        free = [spot for spot in spots if not any(_near(spot, other) for other in taken)]
        if free and len(labels) < MOST_LABELS:
            taken.append(free[0])
            x, y = free[0]
            words = f"{rate_words(link.bytes_per_s)}"
            labels.append(element("text", words, x=x, y=y + 4, class_="figure", text_anchor="middle"))
    return drawn, labels


def _between(spot: tuple[float, float]) -> tuple[float, float]:
    """The spot, moved so that a figure there lies between the columns."""
    room = EDGE + BOX + LABEL[0] / 2
    return min(max(spot[0], room), WIDTH - room), spot[1]


def _near(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return abs(a[0] - b[0]) < LABEL[0] and abs(a[1] - b[1]) < LABEL[1]


def _node(plan: Plan, name: str, place: Place, looks: dict[str, str]) -> Markup:
    node = next(node for node in plan.cluster.nodes if node.name == name)
    squares = [
        element(
            "rect",
            x=place.x + 8 + SQUARE * (index % ROW),
            y=place.y + place.height - 8 - SQUARE * (1 + (node.count - 1) // ROW - index // ROW),
            width=SQUARE - 2,
            height=SQUARE - 2,
            class_=f"gpu {looks.get(f'{name}/{index}', 'idle')}",
        )
        for index in range(node.count)
    ]
    room = BOX - 16
    return element(
        "g",
        element("rect", x=place.x, y=place.y, width=BOX, height=place.height, rx=5),
        element("text", shortened(name, room, NAME), x=place.x + 8, y=place.y + 16, class_="name"),
        element("text", shortened(f"{node.count}×{node.gpu}", room, TEXT), x=place.x + 8, y=place.y + 30),
        *squares,
        class_="node",
    )
