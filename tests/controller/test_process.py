"""The process that works remedies out, as a process: interrupted, killed, orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from hexgen2.controller.process import OtherProcess
from tests.waiting import until

ORPHAN = """
import asyncio, os, signal
from hexgen2.controller.process import OtherProcess
from tests.controller.test_process import pid

async def main():
    print(await OtherProcess(pid)("who"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""


def pid(task: str) -> int:
    """Stands for the work: tells who does it; a task of "die" kills it."""
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


async def test_ctrl_c_is_not_for_it_and_its_death_costs_one_task() -> None:
    work, ask = OtherProcess(pid), "who"
    try:
        first = await work(ask)
        os.kill(first, signal.SIGINT)
        assert await work(ask) == first
        with pytest.raises(BrokenProcessPool):
            await work("die")
        again = await work(ask)
        assert again != first
    finally:
        work.close()
    await until(lambda: not psutil.pid_exists(again))


@pytest.mark.slow
def test_it_does_not_outlive_who_asked(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(int(done.stdout))
