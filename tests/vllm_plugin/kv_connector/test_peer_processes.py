"""Prefill workers that are killed or hang while they are read from, over shared memory and over TCP."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest


# Looked for, not imported: NIXL must not be loaded into a process that has OR-Tools.
@pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL comes with the cpu and cuda extras")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("scenario", "transports"),
    [("killed", ""), ("killed-cold", "tcp"), ("stopped", "tcp")],
)
def test_a_dying_peer_fails_the_load_and_writes_nothing_later(scenario: str, transports: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UCX_LOG_LEVEL": "error"}
    if transports:
        environment["UCX_TLS"] = transports
    command = [sys.executable, "-m", "tests.vllm_plugin.kv_connector.reader_process", scenario]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed as it should" in done.stdout
