"""A plan becomes processes: the argument vector, environment and ports of each, and the coordinator's
config."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from hexgen2.coordinator.config import CoordinatorConfig, EngineEndpoint, Limits, RouteShare
from hexgen2.deploy import kv_transfer, numerics
from hexgen2.deploy.engine import UNSET, EngineContext, Seat, arguments, environment
from hexgen2.deploy.options import EngineOptions
from hexgen2.deploy.ports import PortSource, two_ports
from hexgen2.deploy.ranks import divide, node_of
from hexgen2.deploy.site import HostSite, Site
from hexgen2.deploy.spec import Deployment, ProcessSpec
from hexgen2.specs.errors import InputError
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Group, Plan, check_groups


def compile_plan(
    plan: Plan,
    model: Model,
    ports: PortSource,
    options: EngineOptions | None = None,
    source: str = "plan",
    site: Site | None = None,
) -> Deployment:
    """Compile a plan for vLLM. Pure but for ``ports``, which is asked for every port that a process listens
    on.

    ``model`` is what ``plan.model`` names, with the ``location`` that the engines load; ``source`` is what
    errors call the plan; ``site`` is where the processes run, the nodes' hosts by default. Raises InputError
    where vLLM cannot run the plan, or nodes have no address to serve at.
    """
    context, site = _prepared(plan, model, options, source, site)
    processes = _all_processes(context, plan.groups, site, ports)
    transfer = context.transfer
    notes = () if transfer is None else (f"KV caches: {transfer.words}, since {transfer.reason}",)
    return Deployment(processes=processes, coordinator=_coordinator(context, processes), notes=notes)


def compile_groups(
    plan: Plan,
    groups: Collection[str],
    model: Model,
    ports: PortSource,
    options: EngineOptions | None = None,
    source: str = "plan",
    site: Site | None = None,
) -> tuple[ProcessSpec, ...]:
    """The processes of some groups of a plan; otherwise as `compile_plan`."""
    context, site = _prepared(plan, model, options, source, site)
    return _all_processes(context, [group for group in plan.groups if group.id in groups], site, ports)


def _prepared(
    plan: Plan, model: Model, options: EngineOptions | None, source: str, site: Site | None
) -> tuple[EngineContext, Site]:
    """What all processes have in common; InputError where vLLM cannot run the plan."""
    options = options or EngineOptions()
    check_groups(plan, model, source)
    if not model.location:
        raise InputError(source, "model", f"there are no weights for {plan.model!r}", "give a model directory")
    site = site or HostSite(plan.cluster, used_nodes(plan))
    agreed = numerics.agree(plan, model, options, source)
    transfer = kv_transfer.choose(plan, options, source)
    if transfer is not None and agreed.vendor == "cpu" and model.mla is not None:
        raise InputError(
            source,
            "routes",
            f"vLLM's latent attention on CPU cannot go on from a KV cache from elsewhere ({model.name})",
            "plan with colocated groups alone (--solver colocated)",
        )
    context = EngineContext(
        plan=plan,
        model=model,
        served_names=served_names(plan, model),
        numerics=agreed,
        transfer=transfer,
        options=options,
        source=source,
    )
    return context, site


def _all_processes(
    context: EngineContext, groups: Iterable[Group], site: Site, ports: PortSource
) -> tuple[ProcessSpec, ...]:
    return tuple(process for group in groups for process in _processes(context, group, site, ports))


def used_nodes(plan: Plan) -> set[str]:
    """The nodes that the plan's groups run on."""
    return {node_of(gpu) for group in plan.groups for gpu in group.gpus}


def _processes(context: EngineContext, group: Group, site: Site, ports: PortSource) -> list[ProcessSpec]:
    division = divide(group, context.source)
    shares = division.shares
    head = site.address(group.id, 0, shares[0].node)
    http = ports(head.reach)
    master = lifeline = None
    if len(shares) > 1 and division.layout is None:
        master = ports(head.reach)
    elif len(shares) > 1:
        master, lifeline = two_ports(ports, head.reach)
    transfer = context.transfer if group.role != "colocated" else None
    side_channel = ports(head.reach) if transfer is not None and transfer.side_channel else None
    specs = []
    for rank, share in enumerate(shares):
        seat = Seat(
            share=share,
            rank=rank,
            node_rank=site.node_rank(rank),
            count=len(shares),
            layout=division.layout,
            address=site.address(group.id, rank, share.node),
            head=head,
            devices=site.devices(share.gpus),
            http_port=http,
            master_port=master,
            side_channel_port=side_channel,
        )
        name = group.id if len(shares) == 1 else f"{group.id}.{rank}"
        listens = (
            {"http": http, "master": master, "lifeline": lifeline, "kv": side_channel} if rank == 0 else {}
        )
        specs.append(
            ProcessSpec(
                name=name,
                group_id=group.id,
                role=group.role,
                rank=rank,
                node=share.node,
                host=seat.address.reach,
                argv=arguments(context, group, seat),
                env=environment(context, group, seat),
                unset=UNSET,
                gpus=share.gpus,
                ports={purpose: port for purpose, port in listens.items() if port is not None},
                readiness_url=f"{url(head.reach, http)}/health" if rank == 0 else None,
                log_name=f"{name}.log",
            )
        )
    return specs


def _coordinator(context: EngineContext, processes: tuple[ProcessSpec, ...]) -> CoordinatorConfig:
    urls = {
        process.group_id: url(process.host, process.ports["http"]) for process in processes if process.rank == 0
    }
    return coordinator_config(context.plan, urls, context.served_names)


def coordinator_config(plan: Plan, urls: Mapping[str, str], names: tuple[str, ...]) -> CoordinatorConfig:
    """What the coordinator must know of a plan whose groups answer at ``urls``."""
    return CoordinatorConfig(
        served_model_names=names,
        engines=tuple(
            EngineEndpoint(
                group_id=group.id,
                role=group.role,
                url=urls[group.id],
                share=group.share,
                max_batch=group.max_batch,
                class_shares=group.class_shares if group.role == "colocated" else {},
            )
            for group in plan.groups
        ),
        routes=tuple(
            RouteShare(
                prefill=route.source, decode=route.target, share=route.share, class_shares=route.class_shares
            )
            for route in plan.routes
            if route.share > 0 or any(route.class_shares.values())
        ),
        classes=plan.classes,
        # Who waits longer than the target for the first token has missed it: better told at once.
        limits=Limits() if plan.slo.ttft_s is None else Limits(queue_wait_s=plan.slo.ttft_s),
    )


def url(host: str, port: int) -> str:
    """Where something at this address answers."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def served_names(plan: Plan, model: Model) -> tuple[str, ...]:
    """What clients may call the model: the plan's name for it; a directory goes by its own name."""
    asked = Path(plan.model).name if "/" in plan.model else plan.model
    return tuple(dict.fromkeys((asked, model.name)))
