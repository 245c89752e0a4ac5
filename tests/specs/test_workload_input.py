"""Workloads by name, of one fixed length, and from trace files; mistakes in them get one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hexgen2.specs import InputError
from hexgen2.specs.catalog import load_workload, workload_names

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\n"
MOON = '{"timestamp": 0, "input_length": 5, "output_length": 3}\n'

BAD_FILES = [
    # file name, text, field, problem, mend
    ("t.csv", "", "", "is empty", "TIMESTAMP,ContextTokens,GeneratedTokens"),
    ("t.csv", HEAD, "", "has no requests", "at least one row"),
    (
        "t.csv",
        "time,in,out\n1,2,3\n",
        "row 1",
        "lacks the column TIMESTAMP, ContextTokens,",
        "name the columns",
    ),
    (
        "t.csv",
        HEAD.replace("ContextTokens", "Context") + ROW,
        "row 1",
        "lacks the column ContextTokens",
        "name",
    ),
    ("t.csv", HEAD + ROW + "soon,3,4\n", "row 3, TIMESTAMP", "'soon' is not a time", "write it like 2023"),
    ("t.csv", HEAD + ROW + ROW.replace("374", "0"), "row 3, ContextTokens", "0 is not a whole", "leave it out"),
    ("t.csv", HEAD + ROW.replace("44", "-5"), "row 2, GeneratedTokens", "-5 is not a whole", "correct"),
    ("t.csv", HEAD + ROW.replace("44", "many"), "row 2, GeneratedTokens", "'many' is not a whole", "correct"),
    ("t.csv", HEAD + ROW.replace(",44", ""), "row 2, GeneratedTokens", "None is not a whole", "correct"),
    ("t.csv", HEAD + ROW.replace("374", "1.5"), "row 2, ContextTokens", "'1.5' is not a whole", "correct"),
    ("t.csv", HEAD + ROW.replace("374", "9" * 23), "row 2, ContextTokens", "9999", "correct"),
    (
        "t.csv",
        HEAD + "x" * 200_000 + ",3,4\n",
        "row 2",
        "is not CSV (field larger than",
        "one request per line",
    ),
    ("t.jsonl", MOON.replace("5", "9" * 23), "row 1, input_length", "9999", "correct"),
    ("t.jsonl", MOON.replace("5", "9" * 5000), "row 1", "is no JSON that can be read", "one object per line"),
    ("t.jsonl", "[" * 100_000, "row 1", "is no JSON that can be read", "one object per line"),
    ("t.jsonl", MOON.replace("0,", "9" * 400 + ","), "row 1, timestamp", "9999", "milliseconds"),
    ("t.jsonl", "", "", "has no requests", "at least one row"),
    ("t.jsonl", "\n\n", "", "has no requests", "at least one row"),
    ("t.jsonl", MOON + "{'a': 1}\n", "row 2", "is not JSON", "one object per line"),
    ("t.jsonl", MOON + "\n[1, 2]\n", "row 3", "is not a JSON object", "one object per line"),
    ("t.jsonl", MOON.replace("output_length", "out"), "row 1", "lacks output_length", "input_length"),
    ("t.jsonl", MOON.replace("3}", "0}"), "row 1, output_length", "0 is not a whole number", "correct"),
    ("t.jsonl", MOON.replace("5", "true"), "row 1, input_length", "True is not a whole number", "correct"),
    ("t.jsonl", MOON.replace("0,", '"x",'), "row 1, timestamp", "'x' is not a time", "milliseconds"),
    ("t.jsonl", MOON.replace("0,", "NaN,"), "row 1, timestamp", "nan is not a time", "milliseconds"),
]


@pytest.mark.parametrize(("name", "text", "field", "problem", "mend"), BAD_FILES)
def test_a_bad_trace_is_told_in_one_line(
    tmp_path: Path, name: str, text: str, field: str, problem: str, mend: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_workload(str(path))
    line = str(caught.value)
    assert line.startswith(f"{path}: {field}: {problem}" if field else f"{path}: {problem}")
    assert mend in line.split("; ", 1)[1]
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hpmd", "unknown workload 'hpmd'; use one of hpld, hphd, lphd, lpld, azure-conv, azure-code"),
        (
            "fixed:12",
            "'fixed:12' does not give two lengths of at least 1 and at most 1,000,000,000; write fixed:",
        ),
        ("fixed:99999999999999999999/1", "'fixed:99999999999999999999/1' does not give two lengths"),
        ("fixed:1/" + "9" * 5000, "'fixed:1/9999"),
        ("fixed:0/5", "'fixed:0/5' does not give two lengths"),
        ("fixed:5/-1", "'fixed:5/-1' does not give two lengths"),
    ],
)
def test_a_bad_name_lists_the_known_ones(name: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        load_workload(name)
    assert str(caught.value).startswith(f"workload: {problem}")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    path.write_text("x")
    with pytest.raises(InputError, match=r"ends neither in \.csv nor in \.jsonl"):
        load_workload(str(path))
    with pytest.raises(InputError, match="no such file"):
        load_workload(str(tmp_path / "none.csv"))


def test_a_csv_trace_is_in_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = ["2026-01-01 00:00:10.5,30,3", "2026-01-01 00:00:00,10,1", "2026-01-01 00:00:05+00:00,20,2"]
    # a byte-order mark, another column and CRLF, as spreadsheets write them
    text = "\ufeff" + "\r\n".join(
        ["TIMESTAMP,ContextTokens,GeneratedTokens,User", *(f"{row},u" for row in rows)]
    )
    path.write_text(text, encoding="utf-8")
    workload = load_workload(str(path))
    assert workload.name == str(path)
    assert workload.trace is not None
    assert workload.trace.inputs.tolist() == [10, 20, 30]
    assert workload.trace.outputs.tolist() == [1, 2, 3]
    assert workload.arrivals_s is not None
    assert workload.arrivals_s.tolist() == [0, 5, 10.5]
    assert workload.mean_rps == pytest.approx(2 / 10.5)


def test_a_jsonl_trace_counts_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    later = '{"timestamp": 1500, "input_length": 7, "output_length": 9, "hash_ids": [1]}'
    path.write_text(MOON + later, encoding="utf-8")
    workload = load_workload(str(path))
    assert workload.arrivals_s is not None
    assert workload.arrivals_s.tolist() == [0, 1.5]
    assert workload.trace is not None
    assert workload.trace.inputs.tolist() == [5, 7]


def test_one_moment_has_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOON + MOON, encoding="utf-8")
    assert load_workload(str(path)).mean_rps is None


def test_a_fixed_length_is_that_length_everywhere() -> None:
    workload = load_workload("fixed:512/64")
    assert workload.name == "fixed:512/64"
    assert workload.mean_rps is None
    for lengths in (workload.representative(7), workload.sample(5, np.random.default_rng(0))):
        assert set(lengths.inputs.tolist()) == {512}
        assert set(lengths.outputs.tolist()) == {64}


def test_shipped_names() -> None:
    assert workload_names() == ("hpld", "hphd", "lphd", "lpld", "azure-conv", "azure-code")


@pytest.mark.parametrize("name", ["hpld", "hphd", "lphd", "lpld"])
def test_a_class_keeps_to_its_side_of_the_thresholds(name: str) -> None:
    """H/L: prompts over/up to 512 tokens, answers over/up to 128."""
    workload = load_workload(name)
    drawn = workload.sample(20_000, np.random.default_rng(1))
    assert ((drawn.inputs > 512) == (name[0] == "h")).all()
    assert ((drawn.outputs > 128) == (name[2] == "h")).all()
    assert workload.mean_rps is not None
    assert workload.mean_rps > 0
    assert workload.arrivals_s is None


def test_a_cached_workload_cannot_be_changed() -> None:
    marginals = load_workload("hphd").marginals
    assert marginals is not None
    with pytest.raises(ValueError, match="read-only"):
        marginals.inputs[0] = 1
