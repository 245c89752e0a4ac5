"""`make docs`: the rooms' public faces as pages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

pytest.importorskip("pdoc", reason="pdoc is not installed (it is in the extra dev)")


@pytest.mark.slow
def test_every_room_has_a_page(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"\$\(PY\) -m pdoc (.*)", (ROOT / "Makefile").read_text())
    arguments = recipe.replace("'", "").replace("build/docs", str(tmp_path)).split()
    done = subprocess.run([sys.executable, "-m", "pdoc", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr, done.stderr
    rooms = {path.parent.name for path in (ROOT / "src" / "hexgen2").glob("*/__init__.py")}
    pages = {path.stem for path in (tmp_path / "hexgen2").glob("*.html")}
    assert pages == rooms - {"cli", "vllm_plugin", "assets"}
    assert "class Coordinator" in re.sub(
        r"<[^>]*>", "", (tmp_path / "hexgen2" / "coordinator.html").read_text()
    )
