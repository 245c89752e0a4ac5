"""A process whose parent is killed ends, even where it ignores being asked."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tests.waiting import HUNG_S

CHILD = """
import signal, sys, time
from hexgen2.vllm_plugin.asymmetric.orphans import end_with_parent
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_parent(grace_s=1.0)
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["polite", "deaf"])
def test_the_child_of_a_killed_parent_ends(kind: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, kind], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1.2)
        assert child.is_running()  # not before the parent is gone
    finally:
        parent.kill()
        parent.wait()
    try:
        assert child.wait(timeout=HUNG_S) is None or not child.is_running()
    finally:
        if child.is_running():
            child.kill()
