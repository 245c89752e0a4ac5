"""Groups that end are started again: when, how often, and as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from hexgen2.deploy import EngineFailed, GroupEvent, ProcessExit, RestartPolicy, Supervisor
from hexgen2.specs import InputError
from tests.waiting import HUNG_S

from .builders import cluster, compiled, group, plan

QUICK = RestartPolicy(tries=3, first_pause_s=0.001, max_pause_s=0.004, lasting_s=1000.0, look_s=0.001)
LOG = Path("x.log")


class FakeLauncher:
    """Groups without processes: `fail` ends one, `starts` says what each start brings (None: it comes up)."""

    def __init__(self, starts: list[Exception | None] | None = None) -> None:
        self.starts = starts or []
        self.calls: list[str] = []
        self.gone: tuple[str, ...] = ()
        self._exits: dict[str, asyncio.Queue[ProcessExit]] = {}

    def _queue(self, name: str | None) -> asyncio.Queue[ProcessExit]:
        return self._exits.setdefault(name or "", asyncio.Queue())

    def fail(self, name: str) -> None:
        self._queue(name).put_nowait(ProcessExit(name, 139, ("boom",), LOG))

    async def watch(self, group_id: str | None = None) -> ProcessExit:
        return await self._queue(group_id).get()

    async def end_group(self, group_id: str) -> None:
        self.calls.append(f"end {group_id}")

    async def start_group(self, group_id: str) -> None:
        self.calls.append(f"start {group_id}")
        result = self.starts.pop(0) if self.starts else None
        if result is not None:
            raise result

    async def wait_ready(
        self, timeout_s: float, on_progress: Any = None, groups: Collection[str] | None = None
    ) -> None:
        assert timeout_s == QUICK.ready_s
        assert on_progress is None
        self.calls.append(f"ready {groups}")

    def log_of(self, group_id: str) -> Path:
        return Path(f"{group_id}.log")

    def absent(self, group_id: str) -> Collection[str]:
        return self.gone if group_id == "d0" else ()


class Watch:
    """A supervisor at work on a fake launcher, and what it tells."""

    def __init__(
        self,
        launcher: FakeLauncher,
        groups: Collection[str] = ("d0",),
        policy: RestartPolicy = QUICK,
        silence: Callable[[str], float] = lambda _: 0.0,
    ) -> None:
        self.events: list[GroupEvent] = []
        self._news = asyncio.Event()
        self.supervisor = Supervisor(launcher, groups, self._tell, policy, silence)
        self.task = asyncio.create_task(self.supervisor.run())

    def _tell(self, event: GroupEvent) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, kind: str, times: int = 1) -> None:
        async with asyncio.timeout(HUNG_S):
            while self.kinds().count(kind) < times:
                self._news.clear()
                await self._news.wait()

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    async def stop(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def test_an_engine_that_ends_is_ended_as_a_whole_and_started_again() -> None:
    launcher = FakeLauncher()
    watch = Watch(launcher, ("p0", "d0"))
    launcher.fail("d0")
    await watch.until("up")
    assert launcher.calls == ["end d0", "start d0", "ready ('d0',)"]
    assert watch.kinds() == ["down", "starting", "up"]
    assert "killed by signal 11" in str(watch.events[0].failure)
    assert watch.events[1].attempt == 1
    await watch.stop()


async def test_starts_that_fail_are_repeated_and_bounded() -> None:
    broken = EngineFailed("d0", "ended (exit code 3)", (), LOG)
    launcher = FakeLauncher([broken, InputError("engine d0", "http", "port 1 is in use", "x"), broken, None])
    watch = Watch(launcher)
    launcher.fail("d0")
    await asyncio.wait_for(watch.task, HUNG_S)  # nothing is left to keep
    assert watch.kinds() == ["down", "starting"] * 3 + ["down", "given_up"]
    assert launcher.calls.count("start d0") == 3
    assert launcher.calls[-1] == "end d0", "what is left of the last start is ended too"
    assert "port 1 is in use" in str(watch.events[4].failure)
    assert watch.events[-1].failure is broken


async def test_a_group_that_does_not_last_is_given_up_and_the_others_are_kept() -> None:
    launcher = FakeLauncher()
    watch = Watch(launcher, ("p0", "d0"))
    for times in range(1, 4):
        launcher.fail("d0")
        await watch.until("up", times)
    launcher.fail("d0")
    await watch.until("given_up")
    launcher.fail("p0")
    await watch.until("up", 4)
    assert not watch.task.done()
    await watch.stop()


async def test_a_group_that_lasted_begins_a_new_row() -> None:
    launcher = FakeLauncher()
    watch = Watch(launcher, policy=RestartPolicy(tries=1, first_pause_s=0.001, lasting_s=0.0))
    for times in range(1, 6):
        launcher.fail("d0")
        await watch.until("up", times)
    assert {event.attempt for event in watch.events if event.kind == "starting"} == {1}
    await watch.stop()


async def test_without_restarts_the_first_death_is_the_last() -> None:
    launcher = FakeLauncher()
    watch = Watch(launcher, policy=RestartPolicy(tries=0))
    launcher.fail("d0")
    await asyncio.wait_for(watch.task, HUNG_S)
    assert watch.kinds() == ["down", "given_up"]
    assert launcher.calls == ["end d0"]


async def test_a_silent_engine_is_taken_for_dead() -> None:
    launcher, silent = FakeLauncher(), [1000.0]
    watch = Watch(
        launcher,
        policy=RestartPolicy(tries=2, first_pause_s=0.001, hung_s=0.02),
        silence=lambda _: silent[0],
    )
    await watch.until("starting")
    silent[0] = 0.0
    await watch.until("up")
    assert "d0 has not answered for 0 s" in str(watch.events[0].failure)
    assert watch.events[0].failure is not None
    assert watch.events[0].failure.log == Path("d0.log")
    await watch.stop()


def test_each_start_has_an_identity_and_a_log_of_its_own() -> None:
    two = cluster(("a", "H100-80G-SXM", 2))
    deployment = compiled(
        plan(
            two,
            [group("p0", "prefill", (["a/0"], 8)), group("d0", "decode", (["a/1"], 8))],
            ("p0", "d0", 1.0),
        )
    )
    first = deployment.group("d0")[0]
    second, third = first.again(1), first.again(2)
    arguments = [" ".join(process.argv) for process in (first, second, third)]
    assert [text.count('"engine_id": "d0-run') for text in arguments] == [1, 1, 1]
    assert '"engine_id": "d0-run-1"' in arguments[1]
    assert '"engine_id": "d0-run-2"' in arguments[2]
    assert [process.log_name for process in (first, second, third)] == [
        "d0.log",
        "d0.again1.log",
        "d0.again2.log",
    ]
    assert second.model_copy(update={"argv": first.argv, "log_name": first.log_name}) == first


def test_a_colocated_engine_has_no_identity_to_change() -> None:
    one = cluster(("a", "H100-80G-SXM", 1))
    process = compiled(plan(one, [group("c0", "colocated", (["a/0"], 8))])).group("c0")[0]
    assert process.again(1).argv == process.argv


async def test_a_group_waits_for_its_node_and_begins_a_new_row_when_it_is_back() -> None:
    broken = EngineFailed("d0", "ended (exit code 3)", (), LOG)
    launcher = FakeLauncher([broken, broken, None])
    watch = Watch(launcher)
    launcher.gone = ("n0",)
    launcher.fail("d0")
    await watch.until("absent")
    await asyncio.sleep(0.02)
    assert watch.kinds() == ["down", "absent"], "nothing is tried while the node is gone"
    launcher.gone = ()
    await watch.until("up")
    assert [event.attempt for event in watch.events if event.kind == "starting"] == [1, 2, 3]
    assert launcher.calls.count("start d0") == 3
    await watch.stop()


async def test_all_groups_may_be_let_go_before_others_come() -> None:
    """A plan whose groups all change at once: the supervisor must be there for their successors."""
    launcher = FakeLauncher()
    watch = Watch(launcher, ("d0",))
    await asyncio.sleep(0)
    await watch.supervisor.let_go("d0")
    await asyncio.sleep(0)
    watch.supervisor.keep("d1")
    launcher.fail("d1")
    await watch.until("up")
    assert launcher.calls[:2] == ["end d1", "start d1"]
    assert not watch.task.done()
    await watch.stop()
