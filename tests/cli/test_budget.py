"""`hexgen2 budget` from the outside: the contract, the files it writes, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hexgen2.cli.main import main
from hexgen2.specs.cluster import load_cluster
from hexgen2.specs.plan import load_plan

CATALOG = """
name: shop
offers:
  - {name: big, gpu: A100-80G-PCIe, count: 1, price_per_gpu_hour: 1.5, available: 2}
  - {name: low, gpu: L40, count: 2, price_per_gpu_hour: 0.5, available: 1}
network: {default: {gbps: 25, latency_ms: 0.2}}
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(CATALOG)
    return path


def test_the_answer_its_plan_cluster_and_plot(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, cluster, plot = tmp_path / "plan.json", tmp_path / "cluster.yaml", tmp_path / "plot.svg"
    asked = ["--catalog", str(catalog), "--model", "llama-2-13b", "--workload", "fixed:512/64"]
    files = ["-o", str(plan), "--cluster-out", str(cluster), "--plot", str(plot)]
    assert main(["budget", *asked, "--hourly", "3", *files, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["price_per_hour"] <= 3
    assert document["price_per_hour"] == pytest.approx(sum(part["price_per_hour"] for part in document["mix"]))
    rented = {part["offer"]: part["nodes"] for part in document["mix"]}
    assert rented.get("big", 0) <= 2
    assert rented.get("low", 0) <= 1
    assert document["throughput_rps"] == pytest.approx(document["plan"]["throughput_rps"])
    rates = [point["throughput_rps"] for point in document["frontier"]]
    assert rates == sorted(rates)
    assert {one["gpu"] for one in document["alone"]} == {"A100-80G-PCIe", "L40"}
    assert load_plan(plan).document() == document["plan"]
    assert load_cluster(cluster).document() == document["plan"]["cluster"]
    assert plot.read_text().lstrip().startswith("<?xml")


def test_a_rate_is_answered_in_words(catalog: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--catalog", str(catalog), "--model", "llama-2-13b", "--workload", "fixed:512/64", "--rate", "1"]
    assert main(["budget", *asked]) == 0
    out = capsys.readouterr().out
    assert "for 1 requests/s" in out
    assert "rent 1 × " in out
    assert "only" not in out
    assert "one GPU type alone" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--hourly", "0.5"], "give at least"),
        (["--rate", "1e6"], "raise available"),
        (["--hourly", "-1"], "above zero"),
        (["--hourly", "3", "--rate", "1"], "not allowed with"),
        ([], "one of the arguments --hourly --rate is required"),
        (["--hourly", "3", "--max-gpus", "0"], "at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, catalog: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--catalog", str(catalog), "--model", "llama-2-13b", "--workload", "fixed:512/64"]
    try:
        code = main(["budget", *asked, *arguments])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    assert code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert line in shown.err.splitlines()[-1]
