"""Single groups are started and ended while others run, and the supervisor follows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from hexgen2.coordinator import EngineEndpoint
from hexgen2.deploy import (
    Deployment,
    EngineFailed,
    GroupEvent,
    LocalLauncher,
    ProcessSpec,
    RestartPolicy,
    RunningGroups,
    Supervisor,
)
from hexgen2.specs.plan import Plan
from tests.waiting import until

from . import builders
from .family import Family, deployment


def with_urls(made: Deployment) -> Deployment:
    """The fake engines' deployment with a coordinator config that knows all of them."""
    engines = tuple(
        EngineEndpoint(
            group_id=spec.group_id,
            role="colocated",
            url=f"http://127.0.0.1:{spec.ports['http']}",
            share=1.0 if place == 0 else 0.0,
        )
        for place, spec in enumerate(made.processes)
    )
    return made.model_copy(update={"coordinator": made.coordinator.model_copy(update={"engines": engines})})


class Room:
    """Two fake engines under a launcher and a supervisor; ``next``: what the next plan compiles to."""

    def __init__(self, launcher: LocalLauncher, first: Deployment) -> None:
        self.events: list[GroupEvent] = []
        self.next = first
        policy = RestartPolicy(first_pause_s=0.01)
        names = [spec.group_id for spec in first.processes]
        self.supervisor = Supervisor(launcher, names, self.events.append, policy)
        self.groups = RunningGroups(launcher, self.supervisor, first, self.compiled, ready_s=60.0)

    def compiled(self, _: Plan, groups: Sequence[str]) -> list[ProcessSpec]:
        return [spec for spec in self.next.processes if spec.group_id in groups]


@contextlib.asynccontextmanager
async def room(tmp_path: Path, of: Family, *behaviours: str) -> AsyncIterator[tuple[Room, LocalLauncher]]:
    first = with_urls(deployment(of, *behaviours))
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(first)
        await launcher.wait_ready(60)
        made = Room(launcher, first)
        task = asyncio.create_task(made.supervisor.run())
        await asyncio.sleep(0)
        yield made, launcher
        task.cancel()
        await asyncio.wait((task,))


def any_plan() -> Plan:
    devices = builders.cluster(("n0", "L40", 1))
    return builders.plan(devices, [builders.group("c0", "colocated", (["n0/0"], 2))])


def renamed(made: Deployment, old: str, new: str) -> Deployment:
    processes = tuple(
        spec.model_copy(update={"name": new, "group_id": new, "log_name": f"{new}.log"})
        for spec in made.processes
        if spec.group_id == old
    )
    return with_urls(made.model_copy(update={"processes": processes}))


async def test_a_group_is_replaced_by_another(tmp_path: Path, family: Family) -> None:
    async with room(tmp_path, family, "family", "family") as (made, launcher):
        await made.groups.end(["e1"])
        assert set(made.groups.urls) == {"e0"}
        assert set(launcher.pids()) == {"e0"}
        made.next = renamed(deployment(family, "family"), "e0", "e7")
        await made.groups.start(any_plan(), ["e7"])
        assert set(launcher.pids()) == {"e0", "e7"}
        assert launcher.log_of("e7").name == "e7.log"
        assert made.events == []  # what was asked for is no death
        os.kill(launcher.pids()["e7"], signal.SIGTERM)
        await until(lambda: any(event.kind == "up" for event in made.events))
        assert {event.group for event in made.events} == {"e7"}  # the new one is kept alive too


async def test_a_group_comes_back_under_its_name_with_another_identity(
    tmp_path: Path,
    family: Family,
) -> None:
    async with room(tmp_path, family, "family", "family") as (made, launcher):
        await made.groups.end(["e1"])
        made.next = renamed(deployment(family, "family"), "e0", "e1")
        await made.groups.start(any_plan(), ["e1"])
        assert launcher.log_of("e1").name == "e1.again1.log"


async def test_a_group_that_does_not_start_leaves_nothing(tmp_path: Path, family: Family) -> None:
    async with room(tmp_path, family, "family") as (made, launcher):
        made.next = renamed(deployment(family, "dies"), "e0", "e7")
        with pytest.raises(EngineFailed, match="no such model"):
            await made.groups.start(any_plan(), ["e7"])
        assert set(launcher.pids()) == {"e0"}
        assert set(made.groups.urls) == {"e0"}
