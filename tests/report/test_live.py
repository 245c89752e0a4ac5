"""The live pictures: what was measured in place of what was planned; the style of the live page."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from hexgen2.report.live import flows_now, measured_links, network_now, page_files
from hexgen2.report.page.flows import Measured, Station
from tests.report.test_page import SVG, colours, contrast, plan

STATIONS = (
    Station(("p0",), "prefill", 1.0, "2×H100"),
    Station(("d0",), "decode", 0.45, "2×L40"),
    Station(("d1",), "decode", 0.45, "2×L40"),
)
ROUTES = {("p0", "d0"): 0.45, ("p0", "d1"): 0.45}


def test_what_was_measured_lies_on_what_was_planned() -> None:
    measured = Measured({("p0", "d0"): 0.75, ("p0", "d1"): 0.0}, down=frozenset({"d1"}))
    svg = flows_now(STATIONS, ROUTES, measured)
    root = ElementTree.fromstring(svg)
    ribbons = [(p.attrib["class"], float(p.attrib["stroke-width"])) for p in root.iter(f"{SVG}path")]
    (planned,), (real,) = (
        [width for name, width in ribbons if name.endswith(kind)] for kind in ("planned", "real")
    )
    assert real == pytest.approx(0.75 / 0.9 * planned, rel=1e-3), "alike groups are one box"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "d0, d1 · 75%" in texts
    assert {"plan 90%", "1 of 2 down"} <= set(texts)
    assert "d0 45% (now 75%)" in svg.split("</desc>")[0].replace("p0 to ", "")


def test_without_requests_only_the_plan_is_shown() -> None:
    svg = flows_now(STATIONS, ROUTES, Measured(idle=True))
    assert 'class="ribbon real"' not in svg
    assert "now" not in svg


def test_links_carry_what_the_routes_received() -> None:
    one = plan(links=[{"from": "b", "to": "a", "bytes_per_s": 4e8, "use": 0.5}])
    (link,) = measured_links(one, {("p0", "d0"): 1e8})
    assert (link.source, link.target) == ("b", "a")
    assert link.bytes_per_s == pytest.approx(1e8)
    assert link.use == pytest.approx(1e8 / (25e9 / 8)), "of the 25 Gb/s between the nodes"
    (still,) = measured_links(one, {("p0", "gone"): 1e8})
    assert still.bytes_per_s == 0


def test_a_plan_that_does_not_tell_of_links_has_those_of_its_routes() -> None:
    svg = network_now(plan(links=[]), {("p0", "d0"): 2e8}, ())
    assert svg.count('class="link"') == 1, "b to a; from b to itself there is no link"
    assert "200 MB/s" in svg


def test_the_network_keeps_its_places_whatever_is_measured() -> None:
    one = plan(links=[{"from": "b", "to": "a", "bytes_per_s": 4e8, "use": 0.5}])

    def boxes(svg: str) -> list[tuple[str, str]]:
        root = ElementTree.fromstring(svg)
        return [(rect.attrib["x"], rect.attrib["y"]) for rect in root.iter(f"{SVG}rect")]

    idle, busy = network_now(one, {}, ()), network_now(one, {("p0", "d0"): 3e8}, ("d0",))
    assert boxes(idle) == boxes(busy)
    assert "300 MB/s" in busy
    assert "MB/s" not in idle
    assert busy.count('class="gpu decode down"') == 3


def test_the_page_needs_a_key_only_where_keys_are_on() -> None:
    assert b'content="off"' in page_files(False)["/live"].body
    assert b'content="on"' in page_files(True)["/live"].body


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_what_the_live_page_adds_stands_out_too(scheme: int) -> None:
    """Contrast of at least 4.5 for text (WCAG 2.2, 1.4.3)."""
    known = colours(page_files(False)["/live/page.css"].body.decode(), scheme)
    for text in ("warn", "good", "full", "decode", "prefill", "soft", "ink"):
        for ground in ("ground", "card"):
            assert contrast(known[text], known[ground]) >= 4.5, (text, ground)
