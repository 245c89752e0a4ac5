"""`hexgen2 plan` from the outside: DESIGN section 9's contract, checked by computations of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hexgen2.cli.main import main
from hexgen2.scheduler import Problem, schedule
from hexgen2.specs.plan import Plan

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"
KEYS = {
    *("version", "cluster", "model", "workload", "engine", "solver", "seed", "objective", "throughput_rps"),
    *("output_tokens_per_s", "price_per_hour", "upper_bound", "gap", "wall_s", "groups", "routes"),
    *("bottleneck", "shadow_prices", "rejected"),
}
# Written down here from the data sheets and the model's card, so as not to trust the catalog with itself.
MEMORY_GB = {"H100-80G-SXM": 85.9, "A100-80G-PCIe": 85.9, "L40": 51.6, "A6000": 51.6}
LLAMA_70B = {"layers": 80, "layer_params": 855_638_016, "embedding_params": 32_000 * 8_192}


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    out = capsys.readouterr().out
    document: dict[str, Any] = json.loads(out)  # fails on anything beside the one document
    return document


@pytest.mark.parametrize(
    ("cluster", "engine", "solver"),
    [("mixed-1", "vllm", "paper"), ("mixed-5", "any", "paper"), ("mixed-1", "any", "hexgen2")],
)
def test_a_plan_keeps_the_contract(
    cluster: str, engine: str, solver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES / f"{cluster}.yaml"
    asked = ("--cluster", str(path), "--model", "llama-2-70b", "--workload", "hphd")
    arguments = (*asked, "--engine", engine, "--solver", solver)
    plan = plan_json(capsys, *arguments)
    assert plan.keys() >= KEYS
    assert plan["objective"]["name"] == "throughput"
    assert plan["objective"]["value"] == pytest.approx(plan["throughput_rps"])

    kinds = {
        f"{node['name']}/{index}": node["gpu"]
        for node in plan["cluster"]["nodes"]
        for index in range(node["count"])
    }
    used = [gpu for group in plan["groups"] for stage in group["stages"] for gpu in stage["gpus"]]
    assert set(used) <= set(kinds)
    assert len(used) == len(set(used))

    for group in plan["groups"]:
        assert sum(stage["layers"] for stage in group["stages"]) == LLAMA_70B["layers"]
        for place, stage in enumerate(group["stages"]):
            assert stage["tp"] == len(stage["gpus"])
            ends = (place == 0) + (place == len(group["stages"]) - 1)
            params = stage["layers"] * LLAMA_70B["layer_params"] + ends * LLAMA_70B["embedding_params"]
            for gpu in stage["gpus"]:
                assert 2 * params / stage["tp"] <= 0.9 * MEMORY_GB[kinds[gpu]] * 1e9
        if engine == "vllm":
            assert len({stage["tp"] for stage in group["stages"]}) == 1
            assert group["role"] != "decode" or len(group["stages"]) == 1

    colocated = sum(group["share"] for group in plan["groups"] if group["role"] == "colocated")
    assert sum(route["share"] for route in plan["routes"]) + colocated == pytest.approx(1)
    for group in plan["groups"]:
        if group["role"] != "colocated":
            end = "from" if group["role"] == "prefill" else "to"
            carried = sum(route["share"] for route in plan["routes"] if route[end] == group["id"])
            assert group["share"] == pytest.approx(carried)
        assert group["share"] * plan["throughput_rps"] <= group["capacity_rps"] * (1 + 1e-6)
    for route in plan["routes"]:
        assert route["rps"] == pytest.approx(route["share"] * plan["throughput_rps"])
        assert route["rps"] <= route["capacity_rps"] * (1 + 1e-6)

    again = plan_json(capsys, *arguments)
    assert {**again, "wall_s": 0} == {**plan, "wall_s": 0}


def test_a_saved_plan_is_explained_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster, saved, picture = EXAMPLES / "mixed-2.yaml", tmp_path / "plan.json", tmp_path / "plan.svg"
    planned = ["--cluster", str(cluster), "--model", "opt-30b", "--workload", "lphd", "-o", str(saved)]
    plan = plan_json(capsys, *planned)
    assert json.loads(saved.read_text()) == plan
    assert main(["explain", str(saved), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    for group in plan["groups"]:
        # Groups alike in everything are told in one line.
        assert re.search(rf"^{group['role']} (\w+, )*{group['id']}\b", text, re.MULTILINE)
    assert "bottleneck" in text
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("cluster", "model", "workload", "words"),
    [
        ("nodes: [{name: a, gpu: H9, count: 1}]", "opt-13b", "hphd", "nodes[0].gpu: unknown GPU type 'H9'"),
        ("nodes: [{name: a, gpu: L4, count: 0}]", "opt-13b", "hphd", "nodes[0].count: 0 is less than 1"),
        ("nodes: []", "opt-13b", "hphd", "nodes: is empty"),
        ("", "opt-13b", "hphd", "is empty; write a cluster file"),
        ("nodes: [{name: a, gpu: L4", "opt-13b", "hphd", "cluster.yaml: line 1"),
        (
            "nodes: [{name: a, gpu: L4, count: 1}]\nnetwork: {default: {gbps: -1}}",
            "opt-13b",
            "hphd",
            "network.default.gbps: -1 is",
        ),
        (
            "nodes: [{name: a, gpu: L4, count: 1}]\nnetwork: {links: [{between: [a, z], gbps: 1}]}",
            "opt-13b",
            "hphd",
            "network.links[0].between: there is no node 'z'",
        ),
        ("nodes: [{name: a, gpu: L4, count: 2}]", "opt-99b", "hphd", "unknown model 'opt-99b'"),
        ("nodes: [{name: a, gpu: L4, count: 2}]", "opt-13b", "nothing.csv", "nothing.csv"),
        ("nodes: [{name: a, gpu: L4, count: 2}]", "llama-2-70b", "hphd", "GiB"),
    ],
)
def test_bad_input_is_one_line(
    cluster: str, model: str, workload: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster)
    assert main(["plan", "--cluster", str(path), "--model", model, "--workload", workload]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert words in captured.err


def test_an_empty_workload_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "empty.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    arguments = ["--cluster", str(EXAMPLES / "mixed-1.yaml"), "--model", "opt-13b", "--workload", str(trace)]
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "empty.csv" in error


def test_a_saved_plan_is_explained_and_planned_again_for_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, path = tmp_path / "c.yaml", tmp_path / "plan.json"
    cluster.write_text(
        "nodes: [{name: a, gpu: A100-80G-PCIe, count: 1}, {name: b, gpu: L40, count: 1}]\n"
        "network: {default: {gbps: 25}}\n"
    )
    asked = ("--cluster", str(cluster), "--model", "llama-2-13b", "--workload", "hpld")
    plan = plan_json(capsys, *asked, "-o", str(path))
    assert main(["explain", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {key: told[key] for key in plan} == plan
    assert set(told["explanation"]) == {"limits", "choices", "rules", "more"}
    assert main(["explain", str(path), "--why", "--shadow", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    gains = {price["resource"]: price["gain_rps"] for price in more["shadow_prices"] if price["kind"] == "gpu"}
    assert gains.keys() == {"A100-80G-PCIe", "L40"}
    assert gains["A100-80G-PCIe"] > gains["L40"] > 0
    assert next(entry["rule"] for entry in more["rejected"]) == "vllm"
    assert plan_json(capsys, *asked, "--shadow")["shadow_prices"] == more["shadow_prices"]


def test_planning_again_begins_from_the_same_partition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pymetis", reason="--init metis needs the package pymetis")
    cluster, path = tmp_path / "c.yaml", tmp_path / "plan.json"
    cluster.write_text("nodes: [{name: a, gpu: A100-80G-PCIe, count: 2}]\n")
    asked = ("--cluster", str(cluster), "--model", "llama-2-13b", "--workload", "hpld", "-o", str(path))
    assert "init" not in plan_json(capsys, *asked)
    assert plan_json(capsys, *asked, "--init", "metis")["init"] == "metis"
    begun: list[str] = []

    def noted(problem: Problem, **more: Any) -> Plan:
        begun.append(problem.init)
        return schedule(problem, **more)

    monkeypatch.setattr("hexgen2.scheduler.explain.schedule", noted)
    assert main(["explain", str(path), "--why", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["init"] == "metis"
    assert set(begun) == {"metis"}
