"""The pure parts of the paper's evaluation: ratios, deadlines, prices, cases, stored results and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Script = Callable[[str], ModuleType]


@pytest.mark.parametrize(
    ("latencies", "part", "expected"),
    [
        ([1, 2, 3, 10], 0.75, 3.0),
        ([1, 2, 3, 10], 0.76, 10.0),
        ([10, 1, 3, 2], 0.5, 2.0),
        ([5], 0.99, 5.0),
        ([1, 2, 3, inf], 0.75, 3.0),
        ([1, 2, 3, inf], 0.9, inf),
        ([], 0.9, inf),
    ],
)
def test_the_smallest_deadline_that_is_met(
    script: Script, latencies: list[float], part: float, expected: float
) -> None:
    assert script("paper_measure").deadline(latencies, part) == expected


def test_a_deadline_is_met_by_the_part_and_by_no_smaller_one(script: Script) -> None:
    deadline = script("paper_measure").deadline
    latencies = np.random.default_rng(0).exponential(size=997)
    for part in (0.5, 0.9, 0.95, 0.99):
        found = deadline(latencies, part)
        assert np.mean(latencies <= found) >= part
        assert np.mean(latencies < found) < part


def test_the_steady_rate_leaves_both_ends_out(script: Script) -> None:
    steady_rate = script("paper_measure").steady_rate
    assert steady_rate(np.arange(1.0, 9.0)) == pytest.approx(1.0)
    # A slow start and a long tail change nothing.
    middle = np.arange(100.0, 200.0)
    ends = np.concatenate([np.linspace(0, 99, 40), middle, [1e3, 2e3, 5e3] * 10])
    assert steady_rate(ends) == pytest.approx(1.0)
    assert steady_rate(np.array([])) == steady_rate(np.array([1.0])) == 0.0


def test_cases_have_keys_of_their_own(script: Script) -> None:
    cases = script("paper").planned_cases(script("paper").PARTS, quick=False)
    assert len({case.key for case in cases}) == len(cases) == len(set(cases))
    quick = script("paper").planned_cases(script("paper").PARTS, quick=True)
    assert quick
    assert set(quick) < set(cases)


def test_worlds_that_differ_in_the_baseline_share_what_does_not_depend_on_it(script: Script) -> None:
    cases = script("paper_cases")
    alike = cases.Case("ours", "mixed-1", "opt-30b", "hpld", "pairs")
    assert cases.stored_world(alike).world == "base"
    assert cases.stored_world(cases.Case("ours", "mixed-1", "opt-30b", "hpld", "pcie")).world == "pcie"


def rows_of(script: Script, rates: dict[tuple[str, str], float]) -> dict[str, dict[str, Any]]:
    """Rows of every model and load with requests/s by (system, cluster)."""
    cases = script("paper_cases")
    rows = {}
    for (system, cluster), rate in rates.items():
        for model in cases.MODELS:
            for load in cases.CLASSES:
                row = {"rps": rate, "cluster_price": 20.0, "h100s": 2}
                rows[cases.Case(system, cluster, model, load).key] = row
    return rows


def test_ratios_leave_out_what_has_no_figure(script: Script) -> None:
    summary, cases = script("paper_summary"), script("paper_cases")
    rows = rows_of(
        script, {("distserve", cases.HOMOGENEOUS): 4.0, ("ours", "mixed-1"): 6.0, ("ours", "mixed-2"): 0}
    )
    found = summary.ratios(rows, summary.against_distserve("ours"))
    assert found == [1.5] * 8
    shown = summary.spread(found)
    assert (shown.runs, shown.mean, shown.least, shown.most) == (8, 1.5, 1.5, 1.5)
    assert summary.spread([]) is None


def test_deadlines_never_met_have_no_ratio(script: Script) -> None:
    rows = {"a": {"deadlines_s": [2.0, 4.0, None]}, "b": {"deadlines_s": [3.0, None, 9.0]}}
    assert script("paper_summary").deadline_ratios(rows, [("a", "b"), ("a", "missing")]) == [1.5]


@given(price=st.floats(0.5, 20), ratio=st.floats(0.1, 4), others=st.floats(1, 50), h100s=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_requests_per_dollar(script: Script, price: float, ratio: float, others: float, h100s: int) -> None:
    summary = script("paper_summary")
    rental = summary.Rental(ratio, others, h100s)
    eight, mixed = 8 * price, others + h100s * price
    assert rental.per_dollar(price) == pytest.approx(ratio * eight / mixed)
    # At equal prices it is the plain ratio, and dearer H100s always speak for the mixed side.
    assert summary.Rental(ratio, 8 * price - h100s * price, h100s).per_dollar(price) == pytest.approx(ratio)
    assert rental.per_dollar(price * 1.1) > rental.per_dollar(price)
    wanted = rental.per_dollar(price)
    assert summary.price_for([rental], wanted * (1 - 1e-9)) == pytest.approx(price, abs=2e-3)


def test_a_ratio_that_no_price_reaches(script: Script) -> None:
    summary = script("paper_summary")
    # With 4 of the 8 H100 on both sides the ratio per dollar never doubles.
    assert summary.price_for([summary.Rental(1.0, 5.0, 4)], 2.0) is None


def test_faster_links_and_other_h100s(script: Script) -> None:
    document = {
        "nodes": [
            {"name": "a", "gpu": "H100-80G-SXM", "count": 2, "nic_gbps": 100},
            {"name": "b", "gpu": "L40", "count": 4},
        ],
        "network": {"default": {"gbps": 10, "latency_ms": 1}, "links": [{"between": ["a", "b"], "gbps": 40}]},
    }
    changed = script("paper_systems").changed(document, "H100-80G-PCIe", 0.5)
    first, second = changed["nodes"]
    assert (first["gpu"], first["price_per_gpu_hour"], first["nic_gbps"]) == ("H100-80G-PCIe", 3.69, 50)
    assert second == document["nodes"][1]
    assert changed["network"]["default"] == {"gbps": 5, "latency_ms": 1}
    assert changed["network"]["links"][0]["gbps"] == 20
    assert document["nodes"][0]["nic_gbps"] == 100


def test_an_interrupted_run_goes_on(script: Script, tmp_path: Path) -> None:
    make = script("paper_store").Store
    store = make(tmp_path, "code 1")
    store.put("a", {"rps": 1.0})
    store.put("b", {"rps": 2.0})
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text()[:-9])  # killed while it wrote
    again = make(tmp_path, "code 1")
    assert list(again) == ["a"]
    again.put("b", {"rps": 3.0})
    assert make(tmp_path, "code 1")["b"] == {"rps": 3.0}
    assert list(make(tmp_path, "code 2")) == []


def test_the_fingerprint_follows_contents(script: Script, tmp_path: Path) -> None:
    fingerprint = script("paper_store").fingerprint
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("1")
    second.write_text("2")
    known = fingerprint([first, second])
    assert fingerprint([second, first]) == known
    second.write_text("3")
    assert fingerprint([first, second]) != known
    assert {path.suffix for path in script("paper_store").sources()} <= {".py", ".yaml"}


def test_tables_of_few_rows(script: Script) -> None:
    cases, tables = script("paper_cases"), script("paper_tables")
    rates = {("distserve", cases.HOMOGENEOUS): 4.0}
    rates |= {(system, cluster): 6.0 for system in ("ours", "ours-vllm") for cluster in cases.MIXED}
    rates |= {("hexgen", cluster): 5.0 for cluster in cases.MIXED} | {("ours", cases.CHEAPER): 4.0}
    text = tables.report(rows_of(script, rates))
    claim = next(line for line in text.splitlines() if line.startswith("| throughput over DistServe-like"))
    assert [cell.strip() for cell in claim.split("|")[2:6]] == ["1.3×", "≥ 1.5×", "1.50×", "1.50×"]
    assert "| throughput over HexGen-like on the same GPUs, mean | 1.4× | ≥ 1.4× | 1.20× |" in text
    assert "1.00× (1.00 to 1.00)" in text
    assert "## Ablations" not in text
    assert tables.report({}).startswith("## The paper's claims")


def test_a_page_gets_its_tables_and_keeps_its_words(script: Script) -> None:
    tables, cases = script("paper_tables"), script("paper_cases")
    page = "Before.\n<!-- paper.py: throughput -->\nold\nold\n<!-- end -->\nAfter.\n"
    page += "<!-- paper.py: links -->\nkept\n<!-- end -->\n"
    rows = rows_of(script, {("distserve", cases.HOMOGENEOUS): 4.0})
    found = tables.refreshed(page, rows)
    assert "old" not in found
    assert "| llama-2-70b | homogeneous-8xh100 | DistServe-like | 4 | 4 | 4 | 4 | – |" in found
    assert found.startswith("Before.\n")
    assert "After.\n<!-- paper.py: links -->\nkept\n<!-- end -->\n" in found
    assert tables.refreshed(found, rows) == found
    assert found.count("](images/paper-throughput.svg)") == 1


def test_rows_are_json(script: Script) -> None:
    """A quantile that is not reached must not become `Infinity`, which is no JSON."""
    case = script("paper_cases").Case("colocated", "homogeneous-8xh100", "opt-30b", "lpld")
    measure = script("paper_measure")
    row = measure.measured(case)
    assert row["rps"] == pytest.approx(row["planned_rps"], rel=0.1)
    assert row["failed"] == 0
    later = measure.online(case, row["plan"], 0.5 * row["rps"])
    assert later["deadlines_s"] == sorted(later["deadlines_s"])
    assert later["mean_s"] < later["p99_s"] <= later["quantiles_s"][-1]
    json.dumps({"row": row, "online": later}, allow_nan=False)
