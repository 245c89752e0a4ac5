"""Where `serve` runs engines: on this machine or on a Ray cluster, real ones or emulated ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hexgen2.deploy import (
    Deployment,
    EngineOptions,
    Launcher,
    LocalLauncher,
    ProcessSpec,
    check_engine,
    compile_emulated,
    compile_emulated_groups,
    compile_groups,
    compile_plan,
    connector_of,
    emulated_processes,
    free_ports,
    used_nodes,
)
from hexgen2.deploy.raycluster import NodeWatch, RayCluster, RayLauncher, RayPorts, RaySite, connected
from hexgen2.specs.model import Model
from hexgen2.specs.plan import Plan

LauncherName = Literal["local", "ray"]
Again = Callable[[Plan, Sequence[str]], Sequence[ProcessSpec]]


@dataclass(frozen=True)
class Emulation:
    """Engines without GPUs in place of real ones: ``profiles`` their times are from (the plan's where none are
    given), ``slowdown`` of all times."""

    profiles: tuple[str, ...] = ()
    slowdown: float = 1.0


@dataclass(frozen=True)
class Where:
    """Which engines run, and where. ``source``: what errors call the plan, its file."""

    launcher: LauncherName = "local"
    ray_address: str | None = None
    run_directory: Path = Path("build/serve")
    source: str = "plan"
    engine: EngineOptions = field(default_factory=EngineOptions)
    emulation: Emulation | None = None


@dataclass(frozen=True)
class Platform:
    """A launcher, and the plan as processes for it.

    ``again``: processes of some groups of another plan; None where groups cannot be started singly. ``alive``:
    which nodes live and which are gone, as far as the launcher knows.
    """

    launcher: Launcher
    deployment: Deployment
    again: Again | None
    alive: Callable[[], Mapping[str, bool]] = dict
    watch: NodeWatch | None = None


def platform(plan: Plan, model: Model, where: Where) -> AbstractAsyncContextManager[Platform]:
    """What runs the plan; leaving the block ends whatever was started. InputError where it cannot run there."""
    return _on_ray(plan, model, where) if where.launcher == "ray" else _here(plan, model, where)


@asynccontextmanager
async def _here(plan: Plan, model: Model, where: Where) -> AsyncIterator[Platform]:
    again: Again | None = None
    if (emulation := where.emulation) is not None:
        profiles = emulation.profiles or plan.profiles
        deployment = compile_emulated(plan, model, free_ports(), where.source, profiles, emulation.slowdown)
    else:
        deployment = compile_plan(plan, model, free_ports(), where.engine, where.source)
        for vendor in sorted(_vendors(plan, [gpu for group in plan.groups for gpu in group.gpus])):
            check_engine(vendor, transfers=bool(plan.routes))
        engine = same_connector(plan, where)

        def again(plan: Plan, groups: Sequence[str]) -> Sequence[ProcessSpec]:
            return compile_groups(plan, groups, model, free_ports(), engine, "the new plan")

    async with LocalLauncher(where.run_directory) as launcher:
        yield Platform(launcher, deployment, again)


@asynccontextmanager
async def _on_ray(plan: Plan, model: Model, where: Where) -> AsyncIterator[Platform]:
    with connected(where.ray_address) as ray:
        watch = NodeWatch(ray, plan.cluster)
        watch.places.require(sorted(used_nodes(plan)))
        processes = _RayProcesses(plan, model, where, ray, watch)
        launcher = RayLauncher(where.run_directory, ray, plan.cluster, watch, claim=where.emulation is None)
        async with launcher:
            yield Platform(launcher, processes.first(), processes.again, watch.states, watch)


class _RayProcesses:
    """Plans as processes on a Ray cluster, for its nodes as they are at the moment."""

    def __init__(self, first: Plan, model: Model, where: Where, ray: RayCluster, watch: NodeWatch) -> None:
        self._first = first
        self._model = model
        self._where = where
        self._watch = watch
        self._ports = RayPorts(ray)

    def first(self) -> Deployment:
        plan, where = self._first, self._where
        site = self._site(plan, [group.id for group in plan.groups])
        if (emulation := where.emulation) is not None:
            return compile_emulated_groups(
                plan, self._model, self._ports, site, where.source, emulation.profiles, emulation.slowdown
            )
        return compile_plan(plan, self._model, self._ports, where.engine, where.source, site)

    def again(self, plan: Plan, groups: Sequence[str]) -> Sequence[ProcessSpec]:
        site = self._site(plan, groups)
        if (emulation := self._where.emulation) is not None:
            return emulated_processes(
                plan, groups, self._model, self._ports, site, emulation.profiles, emulation.slowdown
            )
        engine = same_connector(self._first, self._where)
        return compile_groups(plan, groups, self._model, self._ports, engine, "the new plan", site)

    def _site(self, plan: Plan, groups: Collection[str]) -> RaySite:
        """The nodes of these groups, which can run them: asked over Ray, so it takes a moment."""
        gpus: dict[str, list[str]] = defaultdict(list)
        for group in plan.groups:
            for gpu in group.gpus if group.id in groups else ():
                gpus[gpu.rpartition("/")[0]].append(gpu)
        places = self._watch.places
        places.require(sorted(gpus))
        vendors: dict[str, set[str]] = defaultdict(set)
        for node, used in gpus.items() if self._where.emulation is None else ():
            vendors[places.found[node].id] |= _vendors(plan, used)
        self._ports.survey([places.found[node] for node in gpus], vendors, bool(self._first.routes))
        return RaySite(plan.cluster, places.found)


def same_connector(first: Plan, where: Where) -> EngineOptions:
    """The options of engines that are to talk to those of the first plan: with the same KV connector."""
    mode = connector_of(first, where.engine, where.source)
    return where.engine if mode is None else where.engine.model_copy(update={"connector": mode})


def _vendors(plan: Plan, gpus: Collection[str]) -> set[str]:
    return {plan.cluster.gpu_by_id[gpu].type.vendor for gpu in gpus}
