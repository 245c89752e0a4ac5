"""Small fake engines, each a tree of processes that write down who they are."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

from hexgen2.coordinator.config import CoordinatorConfig, EngineEndpoint
from hexgen2.deploy import Deployment, ProcessSpec, free_ports
from tests.waiting import HUNG_S

FAKE = Path(__file__).with_name("fake_engine.py")


def crash(spec: ProcessSpec) -> None:
    """The fake engine ends with a segmentation fault."""
    assert spec.readiness_url is not None
    with suppress(OSError):  # it cannot answer
        urlopen(spec.readiness_url.replace("/health", "/crash"), timeout=HUNG_S)


class Family:
    """The processes of the fake engines of a test."""

    def __init__(self, folder: Path) -> None:
        self._pids = folder / "pids"

    @property
    def path(self) -> str:
        return str(self._pids)

    def pids(self) -> list[int]:
        return [int(line) for line in self._pids.read_text().split()] if self._pids.exists() else []

    def alive(self) -> list[int]:
        """Those that still run (a zombie does not)."""
        found = []
        for pid in self.pids():
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z":
                found.append(pid)
        return found

    def gone(self) -> bool:
        """Whether none is left, in the end."""
        deadline = time.monotonic() + HUNG_S
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.alive()

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + HUNG_S
        while len(self.pids()) < count:
            assert time.monotonic() < deadline, f"only {self.pids()} have started"
            time.sleep(0.05)


def deployment(family: Family, *behaviours: str, host: str = "127.0.0.1") -> Deployment:
    """One fake engine per behaviour; a behaviour that begins with `!` has no readiness URL."""
    port_on = free_ports()
    specs = []
    for number, behaviour in enumerate(behaviours):
        port = port_on("127.0.0.1")
        served = not behaviour.startswith("!")
        specs.append(
            ProcessSpec(
                name=f"e{number}",
                group_id=f"e{number}",
                role="colocated",
                rank=0,
                node=f"n{number}",
                host=host,
                argv=(sys.executable, str(FAKE), str(port), behaviour.removeprefix("!"), family.path),
                env={"HEXGEN2_TEST": "1"},
                gpus=(f"n{number}/0",),
                ports={"http": port},
                readiness_url=f"http://127.0.0.1:{port}/health" if served else None,
                log_name=f"e{number}.log",
            )
        )
    engine = EngineEndpoint(group_id="e0", role="colocated", url="http://127.0.0.1:1", share=1.0)
    config = CoordinatorConfig(served_model_names=("m",), engines=(engine,))
    return Deployment(processes=tuple(specs), coordinator=config)


@contextmanager
def holding(program: str, family: Family, processes: int) -> Iterator[subprocess.Popen[str]]:
    """A Python program that launches engines and says "ready", once so many processes of theirs run."""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            family.wait_for(processes)
            assert len(family.alive()) == processes
            yield holder
        finally:
            holder.kill()  # a test that fails must not wait for it
