"""Run a deployment's processes on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hexgen2.deploy import guard
from hexgen2.deploy.ports import is_this_machine, require_free
from hexgen2.deploy.processes import ProcessLauncher
from hexgen2.deploy.spec import ProcessSpec
from hexgen2.specs.errors import InputError


@dataclass(eq=False)
class LocalProcess:
    """A process under its guard."""

    spec: ProcessSpec
    process: asyncio.subprocess.Process
    log: Path
    words: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int | None:
        code = self.process.returncode
        return code if code is None or code >= 0 else 128 - code

    async def wait(self) -> None:
        await self.process.wait()


class LocalLauncher(ProcessLauncher[LocalProcess]):
    """Each process under a guard (see `guard`) in a session of its own, its output in a file of ``run_dir``.

    Nothing outlives this process: the guards end their engines when `stop` is called, when the `async with`
    block is left, and when this process dies, be it by SIGKILL.
    """

    def pids(self) -> dict[str, int]:
        """The running guards' process ids, by the name of the process that each guards."""
        return {one.spec.name: one.process.pid for one in self._running if one.exit_code is None}

    async def _check(self, processes: Sequence[ProcessSpec]) -> None:
        """InputError for a process whose node is another machine, or whose port is in use here."""
        for spec in processes:
            if not is_this_machine(spec.host):
                raise InputError(
                    "--launcher local",
                    f"node {spec.node}",
                    f"is at {spec.host}, which is not this machine",
                    "use --launcher ray, or `hexgen2 export` and start its part there",
                )
        _require_ports(processes)

    async def _launch(self, processes: Sequence[ProcessSpec]) -> list[LocalProcess]:
        started: list[LocalProcess] = []
        try:
            for spec in processes:
                started.append(await self._start_one(spec))
        except BaseException:
            await self._end(started)
            raise
        return started

    async def _end(self, running: Collection[LocalProcess]) -> None:
        for one in running:
            with suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGTERM)
        bound_s = self._grace_s + guard.LAST_WORDS_S + 1.0
        # Shielded: a second Ctrl-C must not leave this half done.
        await asyncio.shield(asyncio.gather(*(_finish(one.process, bound_s) for one in running)))

    async def _start_one(self, spec: ProcessSpec) -> LocalProcess:
        log = self.run_dir / spec.log_name
        env = {name: value for name, value in os.environ.items() if name not in spec.unset} | spec.env
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, str(self._grace_s), "--", *spec.argv),
                stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the guard that we are gone
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,  # the terminal's Ctrl-C is for us, not for the engines
            )
        return LocalProcess(spec, process, log)


def _require_ports(processes: Iterable[ProcessSpec]) -> None:
    for spec in processes:
        for purpose, port in spec.ports.items():
            require_free(spec.host, port, f"engine {spec.name}", purpose)


async def _finish(process: asyncio.subprocess.Process, bound_s: float) -> None:
    try:
        await asyncio.wait_for(process.wait(), bound_s)
    except TimeoutError:  # the guard itself hangs
        guard.kill_tree(process.pid)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
