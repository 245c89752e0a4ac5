"""The quickstart's commands, run in its order on emulated engines."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hexgen2.deploy import free_ports
from tests.docs.blocks import ROOT, blocks
from tests.waiting import HUNG_S, until

PAGE = ROOT / "docs" / "quickstart.md"
PORT = "8731"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the project's, with `hexgen2` on the path."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tool = tmp_path / "bin" / "hexgen2"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m hexgen2.cli.main "$@"\n')
    tool.chmod(0o755)
    return tmp_path


@pytest.fixture
def served() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Services that a test started; they are interrupted as a user would, and must end well."""
    running: list[subprocess.Popen[bytes]] = []
    yield running
    for process in running:
        process.send_signal(signal.SIGINT)
    for process in running:
        assert process.wait(HUNG_S) == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl, which the page uses, is not installed")
def test_the_quickstart_works(folder: Path, served: list[subprocess.Popen[bytes]]) -> None:
    port = str(free_ports()("127.0.0.1"))
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    ran: list[str] = []
    for kind, _, text in blocks(PAGE):
        if kind == "serve":
            command = ["bash", "-c", f"exec {text.strip().replace(PORT, port)}"]
            served.append(subprocess.Popen(command, cwd=folder, env=environment))
            asyncio.run(until(lambda: answers(port), 2 * HUNG_S, 0.1))
        elif kind == "run":
            script = f"set -e\n{text.replace(PORT, port)}"
            done = subprocess.run(
                ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            ran.append(done.stdout)
    planned, explained, asked = ran
    assert "KV routes" in planned
    assert "What limits it" in explained
    assert (folder / "plan.html").exists()
    assert '"completion_tokens":8' in asked.replace(" ", "")
    assert "serving" in asked


def answers(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
