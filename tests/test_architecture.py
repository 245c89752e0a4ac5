"""Imports run downward only (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hexgen2"
FLOORS = (
    {"specs"},
    {"cost"},
    {"scheduler", "simulator", "emulator"},
    {"report", "calibrate", "controller", "coordinator", "deploy", "loadgen", "probe"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists())


def modules(room: str) -> Iterator[tuple[Path, set[str]]]:
    for path in sorted((SOURCE / room).rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        yield path, names


def rooms_imported(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "hexgen2" and len(part) > 1 and (SOURCE / part[1]).is_dir()}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_is_below_or_beside_it(room: str) -> None:
    for path, names in modules(room):
        for other in rooms_imported(names) - {room}:
            if room == "vllm_plugin":
                assert other == "specs", f"{path} imports {other}: the plugin lives inside vLLM's processes"
            else:
                assert other in FLOOR, f"{path} imports {other}: only vLLM's processes may"
                assert FLOOR[other] <= FLOOR[room], f"{path} imports {other}, which is above it"


def test_rooms_on_one_floor_do_not_import_each_other_in_a_circle() -> None:
    graph = nx.DiGraph()
    for room in ROOMS:
        for _, names in modules(room):
            graph.add_edges_from((room, other) for other in rooms_imported(names) - {room})
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize("room", ["specs", "cost"])
def test_the_lower_floors_use_no_framework(room: str) -> None:
    allowed = {"numpy", "pydantic", "yaml", "hexgen2", "typing_extensions"}
    for path, names in modules(room):
        foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names - allowed
        assert not foreign, f"{path} imports {foreign}"
