"""A plan as one process that emulates all of its engines (`hexgen2.emulator.fleet`)."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen2.cost.profile_files import lasting_name
from hexgen2.deploy.compile import coordinator_config, served_names
from hexgen2.deploy.hosts import LOOPBACK
from hexgen2.deploy.options import EngineOptions
from hexgen2.deploy.ports import PortSource
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.specs.errors import InputError
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan

FLEET = "hexgen2.emulator.fleet"


def compile_emulated(
    plan: Plan,
    model: Model,
    ports: PortSource,
    source: str,
    profiles: Sequence[str] = (),
    slowdown: float = 1.0,
    options: EngineOptions | None = None,
) -> Deployment:
    """The fleet's process and the coordinator in front of it, all on this machine whatever the plan's nodes.

    ``source`` is the plan's file, which the fleet reads again; ``profiles`` as for `plan`. InputError for a
    plan without groups.
    """
    if not plan.groups:
        raise InputError(source, "groups", "is empty", "make the plan again")
    at = {group.id: ports(LOOPBACK) for group in plan.groups}
    urls = {group: f"http://{LOOPBACK}:{port}" for group, port in at.items()}
    names = served_names(plan, model)
    last = plan.groups[-1]
    process = ProcessSpec(
        name="emulated",
        group_id=last.id,
        role=last.role,
        rank=0,
        node=plan.cluster.nodes[0].name,
        host=LOOPBACK,
        argv=(
            (options or EngineOptions()).python,
            *("-m", FLEET, "--plan", source, "--model", plan.model, "--host", LOOPBACK),
            *("--served-model-name", *names),
            *("--slowdown", str(slowdown)),
            *(argument for name in profiles for argument in ("--profile", lasting_name(name))),
            *("--at", *(f"{group}={port}" for group, port in at.items())),
        ),
        env={"OMP_NUM_THREADS": "1"},
        gpus=tuple(gpu for group in plan.groups for gpu in group.gpus),
        ports=at,
        readiness_url=f"{urls[last.id]}/health",  # they start in their order
        log_name="emulated.log",
    )
    return Deployment(
        processes=(process,),
        coordinator=coordinator_config(plan, urls, names),
        notes=(
            f"{len(plan.groups)} engines are emulated: their tokens are made up, their times the cost model's",
        ),
    )
