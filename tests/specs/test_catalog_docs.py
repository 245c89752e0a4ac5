"""The tables of docs/catalog.md say what the catalog says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hexgen2.specs.catalog import gpu_prices, gpu_type, gpu_type_names, load_model, model_names

PAGE = (Path(__file__).parents[2] / "docs" / "catalog.md").read_text(encoding="utf-8")


def rows(section: str) -> dict[str, list[str]]:
    """The cells of a section's table, by the name in the first one."""
    text = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    cells = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `"))
    return {first.strip(" `"): [cell.strip() for cell in rest] for first, *rest in cells}


def number(cell: str) -> float:
    match = re.match(r"[\d,.]+", cell)
    assert match is not None, cell
    return float(match[0].replace(",", ""))


def test_gpu_types() -> None:
    table = rows("GPU types")
    assert tuple(table) == gpu_type_names()
    for name, (memory, flops, bandwidth, link, _) in table.items():
        kind = gpu_type(name)
        assert number(memory) == pytest.approx(kind.memory_bytes / 2**30)
        assert number(flops) == pytest.approx(kind.flops / 1e12)
        assert kind.dense_dtype.upper() in flops
        assert number(bandwidth) == pytest.approx(kind.memory_bandwidth / 1e9)
        assert number(link) == pytest.approx(kind.link.bandwidth / 1e9)
        assert kind.link_kind in link


def test_prices() -> None:
    short = {name: cells[-1] for name, cells in rows("GPU types").items() if cells[-1]}
    table = rows("Prices")
    assert set(table) == set(short) == set(gpu_prices())
    for name, (usd, date, source) in table.items():
        entry = gpu_prices()[name]
        assert number(usd) == entry.usd_per_hour
        assert number(short[name]) == pytest.approx(entry.usd_per_hour, abs=0.005)
        assert (date, source) == (str(entry.date), entry.source)


def test_models() -> None:
    table = rows("Models")
    assert tuple(table) == model_names()
    for name, (_, parameters, layers, kv_bytes) in table.items():
        model = load_model(name)
        scale = 1e6 if parameters.endswith("M") else 1e9
        assert number(parameters) == pytest.approx(model.total_params / scale, abs=0.006)
        assert number(layers) == model.layers
        assert number(kv_bytes) == model.kv_bytes_per_token
