"""What a process on another node puts out, followed without Ray: what is asked of an actor is answered here."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hexgen2.deploy.raycluster.launcher import RayLauncher, RayProcess

from ..builders import cluster
from ..family import Family, deployment

CLUSTER = cluster({"name": "a", "gpu": "cpu-1c", "count": 1, "host": "127.0.0.1"})


class Unavailable(Exception):
    """Stands for Ray's."""


def actor(*news: tuple[int, bytes, int | None]) -> Any:
    """An actor with this to tell."""
    left = list(news)

    def remote(*_: Any) -> Any:
        told: Future[tuple[int, bytes, int | None]] = Future()
        told.set_result(left.pop(0))
        return SimpleNamespace(future=lambda: told)

    return SimpleNamespace(news=SimpleNamespace(remote=remote))


def follow(folder: Path, family: Family, log: Path, *news: tuple[int, bytes, int | None]) -> RayProcess:
    """A process whose actor tells this, and the work of following it."""
    exceptions = SimpleNamespace(ActorUnavailableError=Unavailable, RayError=Unavailable)
    ray: Any = SimpleNamespace(ray=SimpleNamespace(remote=lambda _: None, exceptions=exceptions))
    watch: Any = SimpleNamespace()
    launcher = RayLauncher(folder, ray, CLUSTER, watch)
    (spec,) = deployment(family, "well").processes
    node: Any = SimpleNamespace(address="127.0.0.1")
    one = RayProcess(spec, node, actor(*news), None, log)
    one.pump = asyncio.create_task(launcher._follow(one))
    return one


async def test_what_was_not_fetched_in_time_is_said(tmp_path: Path, family: Family) -> None:
    log = tmp_path / "log"
    await follow(tmp_path, family, log, (0, b"one\n", None), (9, b"two\n", None), (13, b"", 0)).wait()
    assert log.read_text() == "one\n\n[5 bytes were not fetched in time]\ntwo\n"


async def test_a_full_disk_here_does_not_end_the_watch(tmp_path: Path, family: Family) -> None:
    """Whoever waits for the process's end would else be told nothing, and a mistake instead."""
    one = follow(tmp_path, family, Path("/dev/full"), (0, b"hello\n", None), (6, b"bye\n", 3))
    await one.wait()
    assert one.exit_code == 3
