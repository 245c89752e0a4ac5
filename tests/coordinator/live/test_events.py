"""Events: found between two readings or configs, told once, and kept within bounds."""

from __future__ import annotations

import pytest

from hexgen2.coordinator import CoordinatorConfig, EngineEndpoint, RouteShare
from hexgen2.coordinator.live.events import (
    MERGE_S,
    MOST,
    EventLog,
    Told,
    changes,
    dark_nodes,
    groups_by_node,
    node_changes,
    turns,
)
from hexgen2.coordinator.live.reading import Reading
from hexgen2.specs.plan import Role, parse_plan
from tests.report.documents import plan_document

QUIET = Reading(0.0, up={"d0": True, "d1": False})


@pytest.mark.parametrize(
    ("now", "lives", "kind", "text"),
    [
        (Reading(1.0, up={"d0": False, "d1": False}), {}, "down", "d0 is down: it left"),
        (Reading(1.0, up={"d0": True, "d1": True}), {}, "up", "d1 is up"),
        (Reading(1.0, up={"d0": True, "d1": False}), {"d0": 1}, "down", "d0 was down for less than a second"),
        (Reading(1.0, restarts={"d0": 1.0}), {}, "restart", "d0 is being started again"),
        (Reading(1.0, failed={("d0", "http_5xx"): 2.0}), {}, "failure", "2 requests failed on d0 (http 5xx)"),
        (Reading(1.0, retries=1.0), {}, "retry", "1 request tried again on another route"),
        (Reading(1.0, migrations=3.0), {}, "migration", "3 streams went on on another engine"),
        (Reading(1.0, broken={"tools": 1.0}), {}, "broken", "1 stream broken off (tools)"),
        (Reading(1.0, statuses={"429": 4.0}), {}, "refused", "4 requests refused: more than can be served"),
    ],
)
def test_a_change_is_told(now: Reading, lives: dict[str, int], kind: str, text: str) -> None:
    log = EventLog()
    for told in changes(QUIET, now, {"d0": "it left"}, lives):
        log.add(told, 1, 0.0)
    assert [(event.kind, event.text) for event in log.since(0)] == [(kind, text)]


def test_where_nothing_changes_nothing_is_told() -> None:
    assert list(changes(QUIET, QUIET, {}, {})) == []


def test_counts_that_follow_each_other_are_one_event() -> None:
    log = EventLog()
    log.add(Told("retry", "{count} request(s) tried again", count=2), 1, 100.0)
    log.add(Told("up", "d0 is up", "d0"), 2, 101.0)
    log.add(Told("retry", "{count} request(s) tried again", count=3), 3, 102.0)
    log.add(Told("retry", "{count} request(s) tried again", count=1), 9, 102.1 + MERGE_S)
    texts = [(event.id, event.text) for event in log.since(0)]
    assert texts == [(1, "5 requests tried again"), (2, "d0 is up"), (3, "1 request tried again")]
    assert [event.id for event in log.since(2)] == [1, 3], "what was added to is told again"


def test_only_the_last_events_are_kept() -> None:
    log = EventLog()
    for number in range(MOST + 50):
        log.add(Told("up", f"d{number} is up"), number, float(number))
    assert len(log.since(-1)) == MOST


def config(roles: dict[str, Role], routes: dict[tuple[str, str], float]) -> CoordinatorConfig:
    return CoordinatorConfig(
        served_model_names=("m",),
        engines=tuple(
            EngineEndpoint(group_id=name, role=role, url=f"http://h/{name}", share=0.5)
            for name, role in roles.items()
        ),
        routes=tuple(RouteShare(prefill=a, decode=b, share=share) for (a, b), share in routes.items()),
    )


BEFORE = config({"p0": "prefill", "d0": "decode", "d1": "decode"}, {("p0", "d0"): 0.6, ("p0", "d1"): 0.4})


@pytest.mark.parametrize(
    ("now", "texts"),
    [
        (BEFORE, []),
        (
            config({"p0": "prefill", "d0": "decode", "d1": "decode"}, {("p0", "d0"): 0.3, ("p0", "d1"): 0.7}),
            ["new shares: p0 → d0 60% → 30%, p0 → d1 40% → 70%"],
        ),
        (
            config({"p0": "prefill", "d0": "prefill", "d1": "decode"}, {("p0", "d1"): 0.4, ("d0", "d1"): 0.6}),
            [
                "d0 prefills now; before, it decoded",
                "new shares: p0 → d0 60% → 0%, d0 → d1 0% → 60%",
            ],
        ),
        (
            config({"p0": "prefill", "d0": "decode", "d2": "decode"}, {("p0", "d0"): 0.6, ("p0", "d2"): 0.4}),
            [
                "d2 is part of the plan now",
                "d1 is not part of the plan any more",
                "new shares: p0 → d1 40% → 0%, p0 → d2 0% → 40%",
            ],
        ),
    ],
)
def test_what_another_config_changes_is_told(now: CoordinatorConfig, texts: list[str]) -> None:
    assert [told.text for told in turns(BEFORE, now)] == texts


@pytest.mark.parametrize(
    ("up", "dark"),
    [
        ({}, set()),
        ({"p0": True, "d0": True, "c0": True}, set()),
        ({"p0": False, "d0": True, "c0": True}, set()),
        ({"p0": True, "d0": False, "c0": False}, {"a"}),
        ({"p0": False, "d0": False, "c0": True}, {"b"}),
        ({"p0": False, "d0": False, "c0": False}, {"a", "b"}),
    ],
)
def test_a_node_is_lost_with_all_groups_that_are_on_it(up: dict[str, bool], dark: set[str]) -> None:
    """d0 is on both nodes: a has d0 and c0, b has p0 and d0."""
    assert dark_nodes(groups_by_node(parse_plan(plan_document(), "test")), up) == dark


def test_nodes_that_are_lost_and_return_are_told() -> None:
    texts = [told.text for told in node_changes({"a", "b"}, {"b", "c"})]
    assert texts == ["node c is lost: none of its groups answers", "node a is back"]
