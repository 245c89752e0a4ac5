"""The explanation of a plan in sentences."""

from __future__ import annotations

from typing import Any

import pytest

from hexgen2.report import explanation
from hexgen2.report.words import alike, ids_words
from hexgen2.specs import Plan, parse_plan
from tests.report.documents import plan_document


def plan(**changes: Any) -> Plan:
    return parse_plan({**plan_document(), **changes}, "test")


def with_groups(**changes: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = plan_document()["groups"]
    return [{**group, **changes} if group["id"] == "p0" else group for group in groups]


def test_the_cut_says_what_is_full_and_what_has_room() -> None:
    """p0 gives 3 of 3.1 req/s and d0, which it fills to 60%, could take 5."""
    lines = explanation(plan())["limits"]
    assert lines[0] == "prefill p0 is full: the plan serves more only if that is relieved."
    assert "The decode groups could serve 67% more." in lines
    assert not [line for line in lines if "link" in line], "the plan does not say what its links carry"
    inside = plan(routes=[], groups=with_groups(share=0.0)[:0])
    assert explanation(inside)["limits"][-1] == "No KV cache crosses a link between nodes."


@pytest.mark.parametrize(
    ("links", "line"),
    [
        (
            [("a", "b", 3.2e9, 0.5)],
            "No link is full; the busiest, a → b, carries 3.2 GB/s, 50% of what it can.",
        ),
        ([("a", "b", 4e7, 0.01)], "No link is full; the busiest, a → b, carries 40 MB/s, 1% of what it can."),
        ([("a", "b", 3e9, 1.0), ("b", "a", 1e9, 0.3)], "Links that KV caches fill: a → b."),
    ],
)
def test_the_network_in_words(links: list[tuple[str, str, float, float]], line: str) -> None:
    keys = ("from", "to", "bytes_per_s", "use")
    shown = explanation(plan(links=[dict(zip(keys, link, strict=True)) for link in links]))["limits"]
    assert shown[-1] == line


@pytest.mark.parametrize(
    ("runner_up", "words"),
    [
        (("prefill", 0.031), "p0 (prefill): next best 2×X TP2 (3.1% less)."),
        (("colocated", 0.5), "p0 (prefill): as colocated 2×X TP2 (50.0% less)."),
        (("prefill", 0.0001), "p0 (prefill): next best 2×X TP2 (as good)."),
        (
            ("prefill", -0.02),
            "p0 (prefill): next best 2×X TP2 (2.0% more, but this solver chooses layouts by another rule).",
        ),
    ],
)
def test_a_runner_up_is_told_with_what_it_loses(runner_up: tuple[str, float], words: str) -> None:
    one = {"role": runner_up[0], "layout": "2×X TP2", "objective": 1.0, "loss": runner_up[1]}
    assert explanation(plan(groups=with_groups(runners_up=[one])))["choices"] == [words]


def test_rules_of_the_whole_plan_come_first() -> None:
    rejected = [
        {"rule": "decode-pp", "detail": "one group", "gain": 0.5, "group": "d0"},
        {"rule": "vllm", "detail": "the plan", "gain": 0.1},
        {"rule": "uniform-tp", "detail": "more of the plan", "gain": 0.2},
    ]
    lines = explanation(plan(rejected=rejected))["rules"]
    assert lines == ["uniform-tp: more of the plan.", "vllm: the plan.", "decode-pp: one group."]


def price(
    resource: str, kind: str, gain: float, how: str = "dual", change: str = "a tenth more"
) -> dict[str, Any]:
    return {"resource": resource, "kind": kind, "change": change, "gain_rps": gain, "how": how}


def test_like_prices_are_one_line_and_gpus_come_first() -> None:
    prices = [
        price("d0", "group", 0.2),
        price("d1", "group", 0.2),
        price("d2", "group", 0.2),
        price("link a→b", "link", 0.4, "resolve", "twice the"),
        price("L40", "gpu", 0.1, "replan", "one more on b"),
        price("T4", "gpu", 0.0, "replan", "one more on a"),
    ]
    assert explanation(plan(shadow_prices=prices))["more"] == [
        "L40, one more on b: +0.1 req/s.",
        "T4, one more on a: nothing found.",
        "twice the bandwidth of link a→b: +0.4 req/s.",
        "a tenth more capacity of each of d0-d2: +0.2 req/s.",
    ]


def test_many_prices_are_cut_short() -> None:
    lines = explanation(plan(shadow_prices=[price(f"d{k}", "group", 1 + k) for k in range(10)]))["more"]
    assert len(lines) == 7
    assert lines[-1] == "4 smaller ones are in the plan file."


def test_alike_groups_are_told_together() -> None:
    one = plan()
    like = one.groups[0].model_copy(update={"id": "p1"})
    many = one.model_copy(update={"groups": (*one.groups, like)})
    names = [ids_words(found) for found in alike(many)]
    assert "p0, p1" in names
    assert sum(len(found) for found in alike(many)) == len(many.groups)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["p0"], "p0"),
        (["p1", "p0"], "p0, p1"),
        (["d3", "d4", "d5"], "d3-d5"),
        (["d0", "d2", "d3", "d4"], "d0, d2-d4"),
    ],
)
def test_ids_are_shortened(ids: list[str], words: str) -> None:
    group = plan().groups[0]
    assert ids_words([group.model_copy(update={"id": name}) for name in ids]) == words
