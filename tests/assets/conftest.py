"""Where the shipped model lies; its recipe is made importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The recipe is a tool beside the package, not a part of it.
sys.path.insert(0, str(ROOT / "tools" / "tiny_llama"))


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The folder of the shipped model."""
    return ROOT / "src" / "hexgen2" / "assets" / "tiny-llama"
