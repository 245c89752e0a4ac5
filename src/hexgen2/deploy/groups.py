"""Single groups of plans, started and ended while others serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from hexgen2.deploy.compile import url
from hexgen2.deploy.launcher import Launcher
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.deploy.supervisor import Supervisor
from hexgen2.specs.plan import Plan


class RunningGroups:
    """The groups that a launcher runs, for whoever changes the plan.

    ``compile_again`` makes processes of some groups of another plan, with ports that are free now; it may block
    for a while. The supervisor must run: it keeps what is started here alive, and leaves alone what is ended.
    """

    def __init__(
        self,
        launcher: Launcher,
        supervisor: Supervisor,
        first: Deployment,
        compile_again: Callable[[Plan, Sequence[str]], Sequence[ProcessSpec]],
        ready_s: float,
    ) -> None:
        self._launcher = launcher
        self._supervisor = supervisor
        self._compile = compile_again
        self._ready_s = ready_s
        self._urls = {engine.group_id: engine.url for engine in first.coordinator.engines}

    @property
    def urls(self) -> Mapping[str, str]:
        """Where each group answers."""
        return self._urls

    async def start(self, plan: Plan, groups: Sequence[str]) -> None:
        """Start groups of a plan and return when they answer; EngineFailed or InputError where they do not.
        None of them is left after an error, whatever it is."""
        processes = await asyncio.to_thread(self._compile, plan, groups)
        self._launcher.add(processes)
        try:
            starts = (self._launcher.start_group(group) for group in groups)
            for failure in await asyncio.gather(*starts, return_exceptions=True):
                if failure is not None:
                    raise failure
            await self._launcher.wait_ready(self._ready_s, groups=groups)
        except BaseException:
            for group in groups:
                await self._launcher.end_group(group)
            raise
        for spec in processes:
            if spec.rank == 0:
                self._urls[spec.group_id] = url(spec.host, spec.ports["http"])
                self._supervisor.keep(spec.group_id)

    async def end(self, groups: Sequence[str]) -> None:
        """End groups, within a bounded time."""
        for group in groups:
            await self._supervisor.let_go(group)
            await self._launcher.end_group(group)
            del self._urls[group]
