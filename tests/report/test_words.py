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


def plan_document() -> dict[str, object]:
    def stage(gpus: list[str], first: int, layers: int) -> dict[str, object]:
        return {"gpus": gpus, "tp": len(gpus), "first_layer": first, "layers": layers}

    def group(
        name: str, role: str, share: float, capacity: float, stages: list[dict[str, object]]
    ) -> dict[str, object]:
        price = {"id": name, "role": role, "share": share, "price_per_hour": 3.0, "capacity_rps": capacity}
        return {**price, "max_batch": 8, "stages": stages}

    return {
        "version": 1,
        "cluster": {
            "name": "two",
            "nodes": [
                {"name": "a", "gpu": "H100-80G-SXM", "count": 4},
                {"name": "b", "gpu": "A100-80G-PCIe", "count": 4},
            ],
            "network": {"default": {"gbps": 25}},
        },
        "model": "llama-2-70b",
        "workload": "hphd",
        "engine": "any",
        "solver": "paper",
        "seed": 0,
        "objective": {"name": "throughput", "value": 4.0, "unit": "requests/s"},
        "throughput_rps": 4.0,
        "output_tokens_per_s": 800.0,
        "price_per_hour": 20.0,
        "wall_s": 0.5,
        "groups": [
            group("p0", "prefill", 0.75, 3.1, [stage(["b/0", "b/1"], 0, 80)]),
            group("d0", "decode", 0.75, 5.0, [stage(["a/0", "a/1"], 0, 50), stage(["b/2"], 50, 30)]),
            group("c0", "colocated", 0.25, 1.0, [stage(["a/2", "a/3"], 0, 80)]),
        ],
        "routes": [{"from": "p0", "to": "d0", "share": 0.75, "rps": 3.0, "capacity_rps": 9.0}],
        "bottleneck": {"elements": ["p0"], "text": "prefill p0 is full"},
    }


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
