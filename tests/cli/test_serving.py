"""What `serve` does with the deaths of engines: report, keep serving, give up when no path can come back."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from rich.console import Console

from hexgen2.cli.serving import Served
from hexgen2.coordinator import Coordinator, CoordinatorConfig, EngineEndpoint, RouteShare
from hexgen2.deploy import EngineFailed, GroupEvent
from hexgen2.deploy.supervisor import EventKind
from hexgen2.specs.plan import Role

ROUTES = (("p0", "d0", 0.5), ("p0", "d1", 0.5))
FAILURE = EngineFailed("d0", "ended (exit code 3)", ("ValueError: x",), Path("d0.log"))


class Stage:
    """A `Served` over a coordinator that does not run, and what it printed."""

    def __init__(self) -> None:
        seats: tuple[tuple[str, Role, float], ...] = (
            ("p0", "prefill", 1.0),
            ("d0", "decode", 0.5),
            ("d1", "decode", 0.5),
        )
        engines = tuple(
            EngineEndpoint(group_id=group, role=role, url="http://127.0.0.1:1", share=share)
            for group, role, share in seats
        )
        routes = tuple(RouteShare(prefill=p, decode=d, share=share) for p, d, share in ROUTES)
        config = CoordinatorConfig(served_model_names=("m",), engines=engines, routes=routes)
        self.coordinator = Coordinator(config)
        self.text = io.StringIO()
        self.served = Served(self.coordinator, Console(file=self.text, width=200))
        for engine in self.coordinator.fleet.engines.values():
            self.coordinator.fleet.mark_up(engine)

    def tell(self, group: str, *kinds: EventKind, attempt: int = 2) -> None:
        for kind in kinds:
            self.served.note(GroupEvent(group, kind, FAILURE, attempt))


async def test_a_death_takes_the_engine_out_and_a_restart_is_counted() -> None:
    stage = Stage()
    fleet = stage.coordinator.fleet
    for _ in range(10):
        fleet.breakers["d0"].failed(0.0)
    stage.tell("d0", "down")
    assert not fleet.engines["d0"].up
    assert fleet.paths_up == 1
    assert stage.coordinator.silent_for("d0") > 0
    stage.tell("d0", "starting", "up")
    assert fleet.breakers["d0"].state(0.0) == "closed", "the new process has failed nobody yet"
    shown = stage.coordinator.metrics.render({}).decode()
    assert 'hexgen2:engine_restarts_total{group="d0",role="decode"} 1.0' in shown
    text = stage.text.getvalue()
    assert "engine d0 ended (exit code 3)\n  ValueError: x" in text
    assert "starting d0 again (attempt 2)\nd0 is ready again" in text


async def test_what_an_engine_said_is_shown_as_it_is() -> None:
    """Brackets are no markup: a line such as the first would end the supervisor, and with it the service."""
    stage = Stage()
    cause = ("OSError: [/usr/lib/libcuda.so] broke", "[rank0]: ValueError: x")
    stage.served.note(GroupEvent("d0", "down", EngineFailed("d0", "ended", cause, Path("[/d0].log"))))
    text = stage.text.getvalue()
    assert all(line in text for line in (*cause, "[/d0].log"))


async def test_serving_goes_on_while_a_path_is_left_or_may_come_back() -> None:
    stage = Stage()
    waiting = asyncio.create_task(stage.served.until_interrupted())
    stage.tell("d0", "down", "given_up")
    stage.tell("p0", "down", "starting")  # no path is up now, but one may be again
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert (
        "d0 stays down: it was started again 2 times and did not last\nserving goes on" in stage.text.getvalue()
    )
    stage.tell("d1", "given_up")
    with pytest.raises(EngineFailed, match="d0 ended"):
        await waiting


async def test_engines_that_are_not_to_be_restarted() -> None:
    stage = Stage()
    stage.tell("p0", "given_up", attempt=0)
    assert "p0 stays down: engines are not to be started again\n" in stage.text.getvalue()
    with pytest.raises(EngineFailed):
        await stage.served.until_interrupted()


async def test_a_mistake_of_the_supervisor_ends_the_service() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    stage = Stage()
    task = asyncio.create_task(broken())
    task.add_done_callback(stage.served.supervisor_ended)
    with pytest.raises(ZeroDivisionError):
        await stage.served.until_interrupted()
