"""A make-believe vLLM, so that the tunings can be tested without waiting for the real one's import."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from hexgen2.vllm_plugin import tunings

FakeModule = Callable[..., types.ModuleType]


@pytest.fixture
def fake_module(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    """Put a module with the given attributes at a dotted name, and empty packages above it."""

    def make(name: str, **attributes: Any) -> types.ModuleType:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if getattr(sys.modules.get(path), "fake", False):
                continue
            module = types.ModuleType(path)
            module.__dict__["fake"] = True
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
            if depth > 1:
                setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
        for attribute, value in attributes.items():
            setattr(sys.modules[name], attribute, value)
        return sys.modules[name]

    return make


@pytest.fixture(autouse=True)
def nothing_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a fresh process as far as the tunings know."""
    monkeypatch.setattr(tunings, "_applied", set())
