"""A plan file that was cut off or changed by hand gets one line; a whole one is read as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plan_documents import plan_document

from hexgen2.specs import InputError, load_plan, parse_plan

Edit = Callable[[dict[str, Any]], object]


def share_of_the_route(document: dict[str, Any], share: float) -> None:
    document["routes"][0]["share"] = share


BAD: list[tuple[str, Edit, str, str]] = [
    # name, what is done to the plan, what the line says is wrong, what it says to do
    ("version", lambda d: d.update(version=7), "version: is 7, this release reads 1", "make the plan again"),
    ("no cluster", lambda d: d.pop("cluster"), "cluster: is missing", "make the plan again"),
    (
        "bad cluster",
        lambda d: d["cluster"]["nodes"][0].update(gpu="H1000"),
        "cluster: nodes[0].gpu: unknown GPU type 'H1000'",
        "use one of",
    ),
    ("missing", lambda d: d.pop("groups"), "groups: is missing", "add 'groups'"),
    ("unknown", lambda d: d.update(speed=3), "speed: is not a known field", "remove it"),
    ("role", lambda d: d["groups"][0].update(role="both"), "groups[0].role: 'both' is not known", "'prefill'"),
    (
        "negative",
        lambda d: d.update(throughput_rps=-1),
        "throughput_rps: -1 is less than 0",
        "at least 0",
    ),
    (
        "NaN",
        lambda d: d["groups"][0].update(capacity_rps=float("nan")),
        "groups[0].capacity_rps: nan is not finite",
        "finite",
    ),
    (
        "strange GPU",
        lambda d: d["groups"][0]["stages"][0].update(gpus=["a/0", "a/9"]),
        "group p0: there is no GPU 'a/9'",
        "use the cluster's GPUs",
    ),
    (
        "GPU twice",
        lambda d: d["groups"][2]["stages"][0].update(gpus=["a/0"]),
        "group c0: GPU 'a/0' is used twice",
        "use each GPU once",
    ),
    (
        "tp",
        lambda d: d["groups"][0]["stages"][0].update(tp=3),
        "groups[0].stages[0]: tp is 3 but there are 2 GPUs",
        "make them equal",
    ),
    (
        "hole in the layers",
        lambda d: d["groups"][1]["stages"][1].update(first_layer=26),
        "group d0: a stage starts at layer 26, not at 25",
        "follow each other",
    ),
    ("id twice", lambda d: d["groups"][1].update(id="p0"), "two groups have one id", "its own"),
    (
        "route to a prefill group",
        lambda d: d["routes"][0].update(to="p0"),
        "route p0 → p0 does not lead from a prefill group to a decode group",
        "correct its ends",
    ),
    (
        "route to nowhere",
        lambda d: d["routes"][0].update(to="d7"),
        "route p0 → d7 does not lead",
        "correct its ends",
    ),
    ("shares", lambda d: share_of_the_route(d, 0.5), "the shares sum to 0.600000", "make them sum to 1"),
]


@pytest.mark.parametrize(("edit", "problem", "mend"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_changed_plan_is_refused_in_one_line(edit: Edit, problem: str, mend: str) -> None:
    document: dict[str, Any] = json.loads(json.dumps(plan_document()))
    edit(document)
    with pytest.raises(InputError) as caught:
        parse_plan(document, "plan.json")
    line = str(caught.value)
    assert line.startswith("plan.json: ")
    assert problem in line
    assert mend in line.split("; ", 1)[1]
    assert "\n" not in line


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_plan_file(tmp_path: Path, kept: float) -> None:
    text = json.dumps(plan_document(), indent=1)
    path = tmp_path / "plan.json"
    path.write_text(text[: int(len(text) * kept)], encoding="utf-8")
    with pytest.raises(InputError, match=r"plan\.json: line \d+: is not whole JSON .*; write the file again"):
        load_plan(path)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_document()), encoding="utf-8")
    plan = load_plan(path)
    assert [group.id for group in plan.role_groups("decode")] == ["d0"]
    assert plan.group_by_id["d0"].gpus == ("b/0", "b/1", "b/2")
    assert plan.routes[0].source == "p0"
    assert plan.cluster.nodes[1].gpu == "A6000"
    written = plan.document()
    assert {key: written[key] for key in plan_document()} == plan_document()
