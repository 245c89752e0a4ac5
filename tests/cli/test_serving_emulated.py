"""`serve --engine emulated`: a plan for GPUs that are not here, served for real."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import aiohttp
import psutil
import pytest
from rich.console import Console

from hexgen2.cli.serving import Emulation, Options, serving
from hexgen2.deploy import EngineFailed, compile_emulated, counted_ports
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
        (guard,) = psutil.Process().children()
        guard.kill()
        with pytest.raises(EngineFailed, match="emulated was killed"):
            await served.until_interrupted()
