"""A plan as processes that emulate its engines (`hexgen2.emulator.fleet`): one for all or one for each."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from hexgen2.cost.profile_files import lasting_name
from hexgen2.deploy.compile import coordinator_config, served_names, url
from hexgen2.deploy.hosts import LOOPBACK
from hexgen2.deploy.options import EngineOptions
from hexgen2.deploy.ports import PortSource
from hexgen2.deploy.ranks import node_of
from hexgen2.deploy.site import Site
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan, check_groups

FLEET = "hexgen2.emulator.fleet"
PLAN_FILE = "plan.json"


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
    plan that nothing can run.
    """
    check_groups(plan, model, source)
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
        argv=_argv(plan, source, LOOPBACK, names, profiles, slowdown, at, options),
        env={"OMP_NUM_THREADS": "1"},
        gpus=tuple(gpu for group in plan.groups for gpu in group.gpus),
        ports=at,
        readiness_url=f"{urls[last.id]}/health",  # they start in their order
        log_name="emulated.log",
    )
    return Deployment(
        processes=(process,),
        coordinator=coordinator_config(plan, urls, names),
        notes=(_note(plan),),
    )


def compile_emulated_groups(
    plan: Plan,
    model: Model,
    ports: PortSource,
    site: Site,
    source: str,
    profiles: Sequence[str] = (),
    slowdown: float = 1.0,
) -> Deployment:
    """The groups' processes where the site says, and the coordinator in front of them. InputError for a plan
    that nothing can run."""
    check_groups(plan, model, source)
    groups = [group.id for group in plan.groups]
    processes = emulated_processes(plan, groups, model, ports, site, profiles, slowdown)
    urls = {spec.group_id: url(spec.host, spec.ports["http"]) for spec in processes if spec.rank == 0}
    return Deployment(
        processes=processes,
        coordinator=coordinator_config(plan, urls, served_names(plan, model)),
        notes=(_note(plan),),
    )


def emulated_processes(
    plan: Plan,
    groups: Collection[str],
    model: Model,
    ports: PortSource,
    site: Site,
    profiles: Sequence[str] = (),
    slowdown: float = 1.0,
) -> tuple[ProcessSpec, ...]:
    """A process for each of these groups, on the node of its first GPU, so that groups start, end and are lost
    one by one.

    A group's other nodes get a process that only waits: their loss is the group's, as with real engines. Each
    decode engine counts what comes to it alone: groups do not feel each other on shared links.
    """
    text = json.dumps(plan.document())
    profiles = profiles or plan.profiles
    names = served_names(plan, model)
    processes: list[ProcessSpec] = []
    for group in plan.groups:
        nodes = list(dict.fromkeys(node_of(gpu) for gpu in group.gpus)) if group.id in groups else []
        for rank, node in enumerate(nodes):
            host = site.address(group.id, rank, node).reach
            name = group.id if len(nodes) == 1 else f"{group.id}.{rank}"
            process = ProcessSpec(
                name=name,
                group_id=group.id,
                role=group.role,
                rank=rank,
                node=node,
                host=host,
                argv=("sleep", "infinity"),
                env={"OMP_NUM_THREADS": "1"},
                gpus=tuple(gpu for gpu in group.gpus if node_of(gpu) == node),
                ports={},
                readiness_url=None,
                log_name=f"{name}.log",
            )
            if rank == 0:
                port = ports(host)
                at = {group.id: port}
                process = process.model_copy(
                    update={
                        "argv": _argv(plan, PLAN_FILE, host, names, profiles, slowdown, at),
                        "ports": {"http": port},
                        "readiness_url": f"{url(host, port)}/health",
                        "files": {PLAN_FILE: text},
                    }
                )
            processes.append(process)
    return tuple(processes)


def _note(plan: Plan) -> str:
    return f"{len(plan.groups)} engines are emulated: their tokens are made up, their times the cost model's"


def _argv(
    plan: Plan,
    plan_file: str,
    host: str,
    names: Sequence[str],
    profiles: Sequence[str],
    slowdown: float,
    at: Mapping[str, int],
    options: EngineOptions | None = None,
) -> tuple[str, ...]:
    return (
        (options or EngineOptions()).python,
        *("-m", FLEET, "--plan", plan_file, "--model", plan.model, "--host", host),
        *("--served-model-name", *names),
        *("--slowdown", str(slowdown)),
        *(argument for name in profiles for argument in ("--profile", lasting_name(name))),
        *("--at", *(f"{group}={port}" for group, port in at.items())),
    )
