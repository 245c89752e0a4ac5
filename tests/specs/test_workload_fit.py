"""The shipped workloads are the fit of the trace, and the fit is as good as docs/workloads.md says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from hexgen2.specs.catalog.workloads import workload_table

ROOT = Path(__file__).parents[2]
TRACE = ROOT.parent / "shared" / "data" / "azure_conv_2023.csv"
CLASSES = {"hphd": 7_620, "hpld": 4_103, "lphd": 2_110, "lpld": 5_533}

needs_trace = pytest.mark.skipif(not TRACE.exists(), reason="../shared/data/azure_conv_2023.csv is not here")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "workload_fit.py"))


@pytest.fixture(scope="module")
def parts(script: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = script["trace_parts"](TRACE, None)
    return parts


@needs_trace
def test_the_classes_split_the_trace(parts: dict[str, Any]) -> None:
    assert {name: len(parts[name][0]) for name in CLASSES} == CLASSES
    assert len(parts["azure-conv"][0]) == sum(CLASSES.values()) == 19_366


@needs_trace
@pytest.mark.parametrize("name", [*CLASSES, "azure-conv"])
def test_the_table_is_the_fit(script: dict[str, Any], parts: dict[str, Any], name: str) -> None:
    shipped = workload_table().workloads[name].model_dump()
    fitted = {key: tuple(v) if isinstance(v, list) else v for key, v in script["fit"](*parts[name]).items()}
    assert shipped == fitted


@needs_trace
@pytest.mark.parametrize("name", [*CLASSES, "azure-conv"])
def test_the_fit_is_close(script: dict[str, Any], parts: dict[str, Any], name: str) -> None:
    """Means to 2%, distributions to 4% of the mean, ranks to 0.01, a class's prompt x answer to 5%."""
    entry = workload_table().workloads[name].model_dump()
    found = script["errors"](entry, parts[name][0])
    assert abs(found["inputs mean"]) < 0.02
    assert abs(found["outputs mean"]) < 0.02
    assert found["inputs distance"] < 0.04
    assert found["outputs distance"] < 0.04
    assert abs(found["rank correlation"]) < 0.01
    if name in CLASSES:
        assert abs(found["prompt x answer"]) < 0.05
