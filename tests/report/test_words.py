"""Words, tables and pictures of a plan."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from hexgen2.report import group_line, print_plan, save_picture
from hexgen2.report.words import nodes_words
from hexgen2.specs import Group, InputError, Plan, Stage, parse_plan
from tests.report.documents import plan_document


@pytest.fixture
def plan() -> Plan:
    return parse_plan(plan_document(), "test")


def test_group_lines_tell_the_arithmetic(plan: Plan) -> None:
    assert [group_line(plan, group) for group in plan.groups] == [
        "prefill p0: 2×A100-80G-PCIe TP2 → 3.1 req/s",
        "decode d0: 2×H100-80G-SXM TP2, 50 layers → 1×A100-80G-PCIe, 30 layers → 5 req/s at batch 8",
        "colocated c0: 2×H100-80G-SXM TP2 → 1 req/s at batch 8",
    ]


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (("a/0",), "a/0"),
        (("a/0", "a/1", "a/2"), "a/0-2"),
        (("a/0", "a/2", "a/3"), "a/0,2-3"),
        (("b/1", "a/3", "b/0"), "b/0-1 a/3"),
    ],
)
def test_nodes_words(gpus: tuple[str, ...], words: str) -> None:
    stage = Stage(gpus=gpus, tp=len(gpus), first_layer=0, layers=1)
    group = Group(
        id="p0", role="prefill", share=1, price_per_hour=0, capacity_rps=1, max_batch=1, stages=(stage,)
    )
    assert nodes_words(group) == words


def test_the_table_names_every_part_of_the_plan(plan: Plan) -> None:
    text = io.StringIO()
    print_plan(Console(file=text, width=200), plan)
    for part in ("2×A100-80G-PCIe TP2", "p0 → d0", "75.0%", "prefill p0 is full", "$20.00/h", "97%"):
        assert part in text.getvalue()


def test_the_svg_is_whole_holds_every_group_and_is_the_same_twice(plan: Plan, tmp_path: Path) -> None:
    save_picture(plan, tmp_path / "one.svg")
    save_picture(plan, tmp_path / "two.svg")
    one = (tmp_path / "one.svg").read_text()
    assert ElementTree.fromstring(one).tag.endswith("svg")
    assert one == (tmp_path / "two.svg").read_text()
    for group in plan.groups:
        assert f"<!-- {group.id} " in one  # matplotlib writes each text as a comment beside its path


def test_an_unknown_picture_format_is_the_users_mistake(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"plan\.gif: cannot draw a \.gif; end the name in \.svg or \.png"):
        save_picture(plan, tmp_path / "plan.gif")
