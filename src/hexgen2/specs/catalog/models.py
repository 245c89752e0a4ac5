"""Models by name, hub id or directory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hexgen2.specs import files
from hexgen2.specs.catalog.hf_config import parse_config
from hexgen2.specs.errors import InputError
from hexgen2.specs.model import Model


def model_names() -> tuple[str, ...]:
    """Every shipped model, in the catalog's order."""
    return tuple(_entries())


def load_model(name_or_dir: str) -> Model:
    """A shipped model by its name or hub id, or the model in a directory with a Hugging Face ``config.json``.

    Raises InputError for an unknown name, a directory without a config, an architecture that is not known, and
    a config that lacks a field.
    """
    for name, entry in _entries().items():
        if name_or_dir in (name, entry.get("location")):
            return _shipped(name)
    path = Path(name_or_dir)
    if path.is_dir():
        return _from_directory(path.resolve().name, path)
    problem = f"{name_or_dir!r} is a file" if path.exists() else f"unknown model {name_or_dir!r}"
    mend = f"use one of {', '.join(model_names())}, or a directory with a config.json"
    raise InputError("model", "", problem, mend)


@cache
def _shipped(name: str) -> Model:
    entry = _entries()[name]
    if "path" in entry:
        with resources.as_file(resources.files("hexgen2").joinpath(entry["path"])) as path:
            return _from_directory(name, path)
    return parse_config(entry["config"], source=f"models.yaml: {name}", name=name, location=entry["location"])


def _from_directory(name: str, path: Path) -> Model:
    config = path / "config.json"
    return parse_config(
        files.read_json(config, "model's config.json"), source=str(config), name=name, location=str(path)
    )


@cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("hexgen2.specs.catalog").joinpath("models.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)["models"]
    return entries
