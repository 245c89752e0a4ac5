"""What runs on a node of a Ray cluster: an actor that holds one process of the plan, and small questions.

The actor starts the process under the guard (see `deploy.guard`), keeps what it writes until that was fetched,
and says how it ended. The guard's standard input is a pipe from the actor: when the actor goes, because the
driver asked, the driver died or Ray ended it, the kernel closes the pipe and the guard ends the engine.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from asyncio import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hexgen2 import __version__
from hexgen2.deploy import guard
from hexgen2.deploy.engine import VISIBLE_DEVICES
from hexgen2.deploy.environment import check_engine
from hexgen2.deploy.ports import free_ports, is_free
from hexgen2.deploy.spec import ProcessSpec

KEPT_BYTES = 4 * 2**20
"""Output that is kept for a driver that does not fetch it; older output is dropped then."""

CARRIED = ("HEXGEN2_", "HF_", "HUGGING_FACE_", "NCCL_", "UCX_", "VLLM_")
"""Variables of the driver that processes on other nodes get too, where the node has none of that name."""

NOT_OURS = ("OMP_NUM_THREADS", *VISIBLE_DEVICES.values())
"""What Ray sets for its workers, beside RAY_*, and is wrong for an engine."""

# Ray kills the children of a worker that ends at once. The shell is that child; the guard, one below, lives on
# and ends the engine in its own time.
SHELL = ("/bin/sh", "-c", '"$@"; exit $?', "hexgen2")


def carried() -> dict[str, str]:
    """The variables of this process that others get."""
    return {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}


def survey(address: str, ports: int, vendors: Sequence[str], transfers: bool) -> tuple[str, list[int]]:
    """This node's version of HexGen-2, and ports that are free here. InputError where vLLM for devices of one
    of ``vendors`` is not ready to start."""
    for vendor in vendors:
        check_engine(vendor, transfers)
    source = free_ports()
    return __version__, [source(address) for _ in range(ports)]


class ProcessActor:
    """One process of a plan. An actor of its own for each, so that they end one by one."""

    def __init__(self, spec: str, grace_s: float, driver_python: str, carried: Mapping[str, str]) -> None:
        """``spec``: a ProcessSpec as JSON; ``driver_python``: the driver's interpreter, in whose place this
        node's is taken; ``carried``: variables of the driver."""
        self._spec = ProcessSpec.model_validate_json(spec)
        self._grace_s = grace_s
        self._argv = [sys.executable if part == driver_python else part for part in self._spec.argv]
        self._carried = dict(carried)
        self._folder = tempfile.TemporaryDirectory(prefix="hexgen2-")
        self._process: subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._output = bytearray()
        self._dropped = 0
        self._changed = asyncio.Event()
        self._exit_code: int | None = None

    async def start(self) -> str | None:
        """Start the process; what keeps it from being started, in words."""
        for purpose, port in self._spec.ports.items():
            if not is_free(self._spec.host, port):
                return f"its port {port} ({purpose}) on {self._spec.host} is in use"
        for name, text in self._spec.files.items():
            (Path(self._folder.name) / name).write_text(text)
        self._process = await asyncio.create_subprocess_exec(
            *(*SHELL, sys.executable, "-I", "-S", guard.__file__, str(self._grace_s), "--", *self._argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            cwd=self._folder.name if self._spec.files else None,
            start_new_session=True,
        )
        self._reading = asyncio.create_task(self._read(self._process))
        return None

    async def news(self, seen: int, wait_s: float) -> tuple[int, bytes, int | None]:
        """Where the output that follows begins (later than ``seen`` where some was dropped), the output, and
        the exit code; as soon as there is something, after ``wait_s`` at the latest. What was ``seen`` is let
        go."""
        self._forget(seen - self._dropped)
        if not self._output and self._exit_code is None:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
        return self._dropped, bytes(self._output), self._exit_code

    async def end(self) -> None:
        """Let the guard end the process; `news` tells when it has."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def pid(self) -> int:
        """The process id of the shell above the guard."""
        assert self._process is not None, "it was not started"
        return self._process.pid

    async def _read(self, process: subprocess.Process) -> None:
        assert process.stdout is not None
        while data := await process.stdout.read(65_536):
            self._output += data
            self._forget(len(self._output) - KEPT_BYTES)
            self._changed.set()
        code = await process.wait()
        self._exit_code = code if code >= 0 else 128 - code
        self._changed.set()

    def _forget(self, count: int) -> None:
        if count > 0:
            del self._output[:count]
            self._dropped += count

    def _environment(self) -> dict[str, str]:
        """The node's variables without Ray's, the driver's that are carried, and the process's own."""
        node = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RAY_") and name not in NOT_OURS
        }
        env = {
            name: value for name, value in (self._carried | node).items() if name not in self._spec.unset
        } | self._spec.env
        devices = _assigned()
        if devices:  # Ray's choice, so that its books are right; the GPUs of a node are alike
            for variable in VISIBLE_DEVICES.values():
                if variable in env:
                    env[variable] = ",".join(devices)
        return env


def _assigned() -> list[str]:
    """The GPUs that Ray has given to this actor."""
    import ray

    return [str(number) for number in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])]
