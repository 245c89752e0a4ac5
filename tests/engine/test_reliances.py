"""The installed vLLM has what the tunings rely on, and takes them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hexgen2.vllm_plugin.tunings import TUNINGS

PROGRAM = """
from hexgen2.vllm_plugin.tunings import TUNINGS
print([p for tuning in TUNINGS for r in tuning.relies_on if (p := r.problem())])
from vllm.plugins import load_general_plugins
load_general_plugins()
"""


@pytest.mark.engine
def test_every_tuning_fits_the_installed_vllm() -> None:
    """In a process of its own: importing vLLM is slow and the tunings cannot be taken back."""
    env = {**os.environ, "HEXGEN2_VLLM_TUNING": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stdout
    # Loaded by vLLM itself, through the entry point.
    applied = ", ".join(tuning.name for tuning in TUNINGS)
    assert f"hexgen2: this vLLM is tuned: {applied}" in run.stderr
