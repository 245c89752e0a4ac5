"""`serve --engine emulated`: a plan for GPUs that are not here, served for real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from io import StringIO
from pathlib import Path

import aiohttp
import psutil
import pytest
from rich.console import Console
from tests.waiting import until

from hexgen2.cli.main import main
from hexgen2.cli.platform import Emulation
from hexgen2.cli.replanning import FixedEngines, controller_for
from hexgen2.cli.serving import Options, serving
from hexgen2.controller import Decision
from hexgen2.coordinator import Coordinator, WorkersFailed
from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.health import HealthWatch
from hexgen2.coordinator.workers import Workers
from hexgen2.deploy import Deployment, EngineFailed, compile_emulated, counted_ports
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan, load_plan

PLAN = Path(__file__).parents[1] / "simulator" / "plan_20_gpus.json"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(PLAN)


def test_one_process_has_all_engines(plan: Plan) -> None:
    deployment = compile_emulated(
        plan, load_model(plan.model), counted_ports(9000), str(PLAN), ("splitwise-2023",), slowdown=2.0
    )
    (process,) = deployment.processes
    assert set(process.ports) == {group.id for group in plan.groups}
    urls = {engine.group_id: engine.url for engine in deployment.coordinator.engines}
    assert urls == {group: f"http://127.0.0.1:{port}" for group, port in process.ports.items()}
    assert {(route.prefill, route.decode) for route in deployment.coordinator.routes} == {
        (route.source, route.target) for route in plan.routes
    }
    joined = " ".join(process.argv)
    assert "--profile splitwise-2023" in joined
    assert "--slowdown 2.0" in joined


def test_a_plan_without_groups_is_refused(plan: Plan) -> None:
    empty = plan.model_copy(update={"groups": (), "routes": ()})
    with pytest.raises(InputError, match="groups: is empty"):
        compile_emulated(empty, load_model(plan.model), counted_ports(9000), "plan.json")


def guard_of(run_directory: Path) -> psutil.Process:
    """The guard of the one process of a run, among this process's children."""
    (spec,) = Deployment.model_validate_json((run_directory / "deployment.json").read_text()).processes
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # others come and go
            if child.cmdline()[-len(spec.argv) :] == list(spec.argv):
                return child
    raise AssertionError("there is no guard")


async def test_a_plan_of_twenty_gpus_answers_here(plan: Plan, tmp_path: Path) -> None:
    options = Options(port=0, run_directory=tmp_path, source=str(PLAN), emulation=Emulation(slowdown=0.01))
    async with serving(plan, options, Console(file=StringIO())) as served:
        body = {"model": plan.model, "prompt": list(range(300)), "max_tokens": 5}
        async with aiohttp.ClientSession() as http:
            for _ in range(3):
                async with http.post(f"{served.url}/v1/completions", json=body) as response:
                    assert response.status == 200
                    answer = await response.json()
                    assert answer["usage"]["completion_tokens"] == 5
        assert await served.kv_bytes() > 0
        guard_of(tmp_path).kill()
        with pytest.raises(EngineFailed, match="emulated was killed"):
            await served.until_interrupted()


async def test_a_controller_runs_beside_a_service(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked for, so nothing is decided; a loss is answered at once."""
    lost, poll, dead = plan.role_groups("prefill")[0].id, HealthWatch.poll, False

    async def sometimes_dead(self: HealthWatch, engine: Engine) -> None:
        if dead and engine.id == lost:
            self._fleet.mark_down(engine, "it is to be dead in this test")
        else:
            await poll(self, engine)

    monkeypatch.setattr(HealthWatch, "poll", sometimes_dead)
    emulation = Emulation(profiles=("splitwise-2023",), slowdown=1.0)
    options = Options(port=0, run_directory=tmp_path, source=str(PLAN), emulation=emulation, replan="on")
    told = StringIO()
    async with serving(plan, options, Console(file=told, width=400)) as served:
        await asyncio.sleep(3.0)
        assert not (tmp_path / "decisions.jsonl").exists()
        dead = True
        await until(lambda: served.coordinator.config.engine(lost).share == 0)
        decision = json.loads((tmp_path / "decisions.jsonl").read_text().splitlines()[0])
        live = served.coordinator.live
        await until(lambda: live.plan() is not plan)
        live.sample()
        shown = {event.kind for event in live.events.since(0)}
    assert {"down", "plan", "routes"} <= shown
    assert decision["action"] in ("routes", "flip")
    assert decision["numbers"]["down"] == [lost]
    assert "engines came or went" in told.getvalue()


def test_replanning_needs_engines_at_the_plans_pace(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", str(PLAN), "--engine", "emulated", "--slowdown", "2", "--replan", "on", "--port", "0"]
    assert main(arguments) == 2
    assert "--replan" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "8000"])
def test_an_address_that_is_not_this_machines_is_told_before_engines_start(
    port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--engine", "emulated", "--run-directory", str(tmp_path / "run"), "--port", port]
    assert main(["serve", str(PLAN), *options, "--host", "no-such-host.invalid"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("hexgen2 serve: --host: no-such-host.invalid is no address of this machine; ")
    assert not (tmp_path / "run").exists()


def test_a_worker_that_does_not_come_up_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Workers) -> None:
        raise WorkersFailed("worker 1 ended (1) while it started")

    monkeypatch.setattr(Workers, "start", fail)
    options = ["--engine", "emulated", "--run-directory", str(tmp_path / "run"), "--port", "0"]
    assert main(["serve", str(PLAN), *options, "--workers", "2"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "hexgen2 serve: worker 1 ended (1) while it started"
    assert not [line for line in told if "Traceback" in line]


def test_a_port_that_cannot_be_counted_up_from_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(PLAN), "--to", "shell", "-o", str(tmp_path), "--first-port", "61000"]) == 2
    assert "options: first_port: 61000 is more than 60000; give" in capsys.readouterr().err


def test_decisions_are_written_as_json(plan: Plan, tmp_path: Path) -> None:
    """Where nothing is served, any remedy's gain is infinite, which JSON does not know."""
    deployment = compile_emulated(plan, load_model(plan.model), counted_ports(9000), str(PLAN))
    controller = controller_for(
        plan,
        Coordinator(deployment.coordinator),
        FixedEngines(deployment),
        mode="dry-run",
        in_place=True,
        started_in_s=1.0,
        run_directory=tmp_path,
        returning=tuple,
        alive=dict,
        console=Console(file=StringIO()),
    )
    controller._tell(Decision("keep", ("nothing is served",), {"gain": math.inf}))

    def unknown(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (line,) = (tmp_path / "decisions.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=unknown)["numbers"] == {"gain": None}


def test_names_with_brackets_are_shown_as_they_are(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = plan.document()
    document["cluster"]["name"], file = "lab [bold] [/x]", tmp_path / "plan.json"
    file.write_text(json.dumps(document))
    assert main(["explain", str(file)]) == 0
    assert " on lab [bold] [/x] (20 GPUs" in capsys.readouterr().out
