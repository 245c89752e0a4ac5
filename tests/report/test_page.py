"""The page of a plan: whole, self-contained, escaped, readable."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hexgen2.cli.main import main
from hexgen2.report.page import (
    Trace,
    TracePoint,
    flows_svg,
    load_trace,
    network_svg,
    plan_page,
    standalone,
    trace_document,
)
from hexgen2.report.page.markup import style_text
from hexgen2.specs import InputError, Plan, parse_plan
from tests.report.documents import plan_document

VOID = {"meta", "br", "hr", "img", "link", "input"}
SVG = "{http://www.w3.org/2000/svg}"
LINKS = [
    {"from": "a", "to": "b", "bytes_per_s": 3.1e9, "use": 1.0},
    {"from": "b", "to": "a", "bytes_per_s": 4e7, "use": 0.02},
]
TRACE = Trace(
    (TracePoint(seconds=0.1, phase="start", value=2.0), TracePoint(seconds=0.4, phase="refine", value=4.0)), 0.9
)


def plan(**changes: Any) -> Plan:
    return parse_plan({**plan_document(), "links": LINKS, **changes}, "test")


class Reader(HTMLParser):
    """Checks that tags close in order; keeps the elements with their attributes and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = plan_page(plan(), TRACE)
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in reader.elements}
    for _, attributes in reader.elements:
        assert not {"src", "href", "srcset"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in page
    assert re.findall(r"url\(([^#])", page) == []
    assert set(re.findall(r"https?://[^\"\s]+", page)) == {"http://www.w3.org/2000/svg"}


def test_the_page_can_be_read_without_seeing_it() -> None:
    elements = Reader(plan_page(plan(), TRACE)).elements
    tags = [tag for tag, _ in elements]
    assert dict(elements)["html"]["lang"] == "en"
    assert tags.count("h1") == tags.count("main") == 1
    pictures = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(pictures) == 3
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)
    headings = {attributes["id"] for tag, attributes in elements if tag == "h2"}
    sections = [attributes["aria-labelledby"] for tag, attributes in elements if tag == "section"]
    assert set(sections) == headings
    assert tags.count("caption") == tags.count("table")
    cells = [attributes for tag, attributes in elements if tag == "th"]
    assert all(attributes.get("scope") in ("row", "col") for attributes in cells)


def test_every_group_route_and_figure_is_on_the_page() -> None:
    text = " ".join(Reader(plan_page(plan())).text)
    for part in (
        "p0",
        "d0",
        "c0",
        "4 req/s",
        "800 tokens/s",
        "$20.00/h",
        "p0 → d0",
        "75.0%",
        "3.1 GB/s",
        "prefill p0 is full",
    ):
        assert part in text


def test_names_are_escaped_everywhere() -> None:
    document = plan_document()
    name = "a<b>&\"'"
    cluster: Any = document["cluster"]
    nodes = [{**node, "name": name if node["name"] == "a" else node["name"]} for node in cluster["nodes"]]
    groups = [
        {
            **group,
            "stages": [
                {**s, "gpus": [g.replace("a/", f"{name}/") for g in s["gpus"]]} for s in group["stages"]
            ],
        }
        for group in document["groups"]
    ]
    strange = parse_plan(
        {
            **document,
            "model": "<script>x</script>",
            "workload": "</style>",
            "cluster": {**cluster, "nodes": nodes},
            "groups": groups,
            "links": [{**LINKS[0], "from": name}],
            "notes": ["</html>"],
        },
        "test",
    )
    reader = Reader(plan_page(strange))
    assert "script" not in {tag for tag, _ in reader.elements}
    assert "<script>x</script> on two" in "".join(reader.text)
    assert ElementTree.fromstring(standalone(network_svg(strange))).tag == f"{SVG}svg"


def test_pictures_are_svg_files_of_their_own() -> None:
    for svg in (network_svg(plan()), flows_svg(plan())):
        root = ElementTree.fromstring(standalone(svg))
        assert root.find(f"{SVG}title") is not None
        assert root.find(f"{SVG}desc") is not None
        assert root.find(f"{SVG}style") is not None
        left, top, width, height = (float(part) for part in root.attrib["viewBox"].split())
        for rect in root.iter(f"{SVG}rect"):
            x, y = float(rect.attrib["x"]), float(rect.attrib["y"])
            assert left <= x <= left + width - float(rect.attrib["width"])
            assert top <= y <= top + height - float(rect.attrib["height"])


def test_links_are_as_wide_as_what_they_carry_and_full_ones_stand_out() -> None:
    root = ElementTree.fromstring(network_svg(plan()))
    links = {
        p.attrib["class"]: float(p.attrib["stroke-width"])
        for p in root.iter(f"{SVG}path")
        if "stroke-width" in p.attrib
    }
    assert links["link-full"] > 5 * links["link"]
    gpus = [rect.attrib["class"] for rect in root.iter(f"{SVG}rect") if "gpu" in rect.attrib.get("class", "")]
    assert sorted(gpus) == sorted(
        ["gpu decode"] * 3 + ["gpu colocated"] * 2 + ["gpu prefill"] * 2 + ["gpu idle"]
    )


def test_ribbons_are_as_wide_as_their_shares() -> None:
    root = ElementTree.fromstring(flows_svg(plan()))
    (ribbon,) = [path for path in root.iter(f"{SVG}path") if path.attrib["class"] == "ribbon"]
    heights = [float(r.attrib["height"]) for r in root.iter(f"{SVG}rect")]
    assert float(ribbon.attrib["stroke-width"]) == pytest.approx(max(heights), rel=1e-4)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """The contrast of two colours as WCAG 2.2 counts it."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def colours(style: str, scheme: int) -> dict[str, str]:
    """The colours by name that a style sheet's `:root` rules set: light (0) or dark (1)."""
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.S)
    return dict(
        pair for block in blocks[scheme::2] for pair in re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)
    )


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: int) -> None:
    """Contrast of at least 4.5 for text and 3 for lines (WCAG 2.2, 1.4.3 and 1.4.11)."""
    known = colours(style_text(), scheme)

    for text in ("ink", "soft"):
        for ground in ("ground", "card"):
            assert contrast(known[text], known[ground]) >= 4.5
    for role in ("prefill", "decode", "colocated"):
        assert contrast(known[role], known["ground"]) >= 4.5
        assert contrast(known["ink"], known[f"{role}-fill"]) >= 4.5
        assert contrast(known[role], known[f"{role}-fill"]) >= 3
    for line in ("full", "flow"):
        assert contrast(known[line], known["ground"]) >= 3


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace_document(TRACE.points, TRACE.end_s)))
    assert load_trace(path) == TRACE
    path.write_text('{"points": [], "end_s": 1}')
    with pytest.raises(InputError, match="points"):
        load_trace(path)


def test_plan_and_explain_write_trace_page_and_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, saved, trace = tmp_path / "c.yaml", tmp_path / "plan.json", tmp_path / "trace.json"
    cluster.write_text(
        "nodes: [{name: a, gpu: A100-80G-PCIe, count: 1}, {name: b, gpu: L40, count: 1}]\n"
        "network: {default: {gbps: 25}}\n"
    )
    asked = ["--cluster", str(cluster), "--model", "llama-2-13b", "--workload", "hpld"]
    assert main(["plan", *asked, "-o", str(saved), "--trace", str(trace)]) == 0
    points = load_trace(trace).points
    assert [point.value for point in points] == sorted(point.value for point in points)
    page, network = tmp_path / "plan.html", tmp_path / "network.svg"
    files = ["--html", str(page), "--network", str(network), "--trace", str(trace)]
    assert main(["explain", str(saved), *files]) == 0
    assert "How the search went" in "".join(Reader(page.read_text()).text)
    assert ElementTree.parse(network).getroot().tag == f"{SVG}svg"
    assert "page written to" in capsys.readouterr().err
