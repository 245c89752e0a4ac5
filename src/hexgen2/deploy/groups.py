"""Single groups of plans on this machine, started and ended while others serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hexgen2.deploy.launcher import EngineFailed
from hexgen2.deploy.local import LocalLauncher
from hexgen2.deploy.spec import Deployment
from hexgen2.deploy.supervisor import Supervisor
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan


class LocalGroups:
    """The groups that a launcher runs, for whoever changes the plan.

    ``compile_again`` makes processes of another plan, with ports that are free now. The supervisor must run: it
    keeps what is started here alive, and leaves alone what is ended.
    """

    def __init__(
        self,
        launcher: LocalLauncher,
        supervisor: Supervisor,
        first: Deployment,
        compile_again: Callable[[Plan], Deployment],
        ready_s: float,
    ) -> None:
        self._launcher = launcher
        self._supervisor = supervisor
        self._compile = compile_again
        self._ready_s = ready_s
        self._urls = _urls(first)

    @property
    def urls(self) -> Mapping[str, str]:
        """Where each group answers."""
        return self._urls

    async def start(self, plan: Plan, groups: Sequence[str]) -> None:
        """Start groups of a plan and return when they answer; EngineFailed or InputError where they do not, and
        then none of them is left."""
        deployment = self._compile(plan)
        self._launcher.add([spec for spec in deployment.processes if spec.group_id in groups])
        try:
            for group in groups:
                await self._launcher.start_group(group)
            await self._launcher.wait_ready(self._ready_s, groups=groups)
        except (EngineFailed, InputError, OSError):
            for group in groups:
                await self._launcher.end_group(group)
            raise
        urls = _urls(deployment)
        for group in groups:
            self._urls[group] = urls[group]
            self._supervisor.keep(group)

    async def end(self, groups: Sequence[str]) -> None:
        """End groups, within a bounded time."""
        for group in groups:
            await self._supervisor.let_go(group)
            await self._launcher.end_group(group)
            del self._urls[group]


def _urls(deployment: Deployment) -> dict[str, str]:
    return {engine.group_id: engine.url for engine in deployment.coordinator.engines}
