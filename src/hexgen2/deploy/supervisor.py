"""Engines that end are started again: with growing pauses, a bounded number of times, a group as a whole.

An engine's processes hang or hold their devices once one of them is gone, so all of a group are ended before
any is started again. Each start has a KV identity of its own (see `ProcessSpec.again`), since its peers
remember the old one's memory layout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from hexgen2.deploy.launcher import EngineFailed, GroupLauncher
from hexgen2.specs.errors import InputError


@dataclass(frozen=True)
class RestartPolicy:
    """When to start a group again, and when no more. Seconds where it says ``_s``.

    ``tries``: starts in a row; a group that served for ``lasting_s`` begins a new row. ``hung_s``: a group that
    was ready and has not answered for this long is taken for dead, though its processes live. ``look_s``: how
    often it is looked whether a node is back.
    """

    tries: int = 5
    first_pause_s: float = 1.0
    max_pause_s: float = 60.0
    lasting_s: float = 300.0
    ready_s: float = 1800.0
    hung_s: float = 120.0
    look_s: float = 0.5

    def pause_s(self, tried: int) -> float:
        """The pause before the next start after ``tried`` starts that did not last.

        >>> [RestartPolicy().pause_s(tried) for tried in (0, 1, 2, 9)]
        [1.0, 2.0, 4.0, 60.0]
        """
        return min(self.first_pause_s * 2.0 ** min(tried, 60), self.max_pause_s)


EventKind = Literal["down", "absent", "starting", "up", "given_up"]


@dataclass(frozen=True)
class GroupEvent:
    """What became of a group. ``failure`` says why it is down; ``attempt`` counts the starts of a row. It is
    `absent` while a node of its is gone: it waits for the node's return, however long."""

    group: str
    kind: EventKind
    failure: EngineFailed | None = None
    attempt: int = 0


Silence = Callable[[str], float]
"""For how many seconds a group has not answered; 0 where it does."""


class Supervisor:
    """Watches groups that are ready, and tells of each event."""

    def __init__(
        self,
        launcher: GroupLauncher,
        groups: Collection[str],
        tell: Callable[[GroupEvent], None],
        policy: RestartPolicy | None = None,
        silence: Silence = lambda _: 0.0,
    ) -> None:
        self._launcher = launcher
        self._groups = list(groups)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: asyncio.TaskGroup | None = None
        self._all_given_up = asyncio.Event()
        self._tell = tell
        self._policy = policy or RestartPolicy()
        self._silence = silence

    async def run(self) -> None:
        """Keep the groups alive; returns when the last one is given up. One that is let go is not: others may
        come in its place."""
        async with asyncio.TaskGroup() as self._running:
            for group in self._groups:
                self.keep(group)
            await self._all_given_up.wait()

    def keep(self, group: str) -> None:
        """Keep another group alive, which is ready; to be called while `run` runs."""
        assert self._running is not None, "the supervisor does not run"
        self._tasks[group] = self._running.create_task(self._keep(group), name=f"keep-{group}")

    async def let_go(self, group: str) -> None:
        """Leave a group alone from now on, which is to be ended."""
        task = self._tasks.pop(group, None)
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def _keep(self, group: str) -> None:
        clock, policy, tried = asyncio.get_running_loop().time, self._policy, 0
        while True:
            began = clock()
            failure = await self._death(group)
            if clock() - began >= policy.lasting_s:
                tried = 0
            while True:
                self._tell(GroupEvent(group, "down", failure, tried))
                await self._launcher.end_group(group)
                if await self._nodes_back(group, failure):
                    tried = 0
                if tried >= policy.tries:
                    self._tell(GroupEvent(group, "given_up", failure, tried))
                    del self._tasks[group]
                    if not self._tasks:
                        self._all_given_up.set()
                    return
                await asyncio.sleep(policy.pause_s(tried))
                tried += 1
                self._tell(GroupEvent(group, "starting", attempt=tried))
                try:
                    await self._launcher.start_group(group)
                    await self._launcher.wait_ready(policy.ready_s, groups=(group,))
                except EngineFailed as again:
                    failure = again
                except (InputError, OSError) as error:  # its port was taken, its log cannot be written
                    failure = EngineFailed(group, f"could not be started again: {error}", (), failure.log)
                else:
                    break
            self._tell(GroupEvent(group, "up", attempt=tried))

    async def _nodes_back(self, group: str, failure: EngineFailed) -> bool:
        """Wait for the nodes of a group; whether any was gone."""
        gone = self._launcher.absent(group)
        if not gone:
            return False
        self._tell(GroupEvent(group, "absent", failure))
        while gone:
            await asyncio.sleep(self._policy.look_s)
            gone = self._launcher.absent(group)
        return True

    async def _death(self, group: str) -> EngineFailed:
        """Wait until a process of the group ends, or all of it is silent for too long."""
        clock, bound_s = asyncio.get_running_loop().time, self._policy.hung_s
        ended, began = asyncio.create_task(self._launcher.watch(group)), clock()
        try:
            while not ended.done():
                await asyncio.wait((ended,), timeout=min(1.0, bound_s / 4))
                # It may not have been asked since its start.
                silent_s = min(self._silence(group), clock() - began)
                if not ended.done() and silent_s >= bound_s:
                    problem = f"has not answered for {silent_s:.0f} s"
                    return EngineFailed(group, problem, (), self._launcher.log_of(group))
        finally:
            ended.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait((ended,))
        return EngineFailed.exited(ended.result())
