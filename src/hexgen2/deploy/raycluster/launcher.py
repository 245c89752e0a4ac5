"""Run a deployment's processes on the nodes of a Ray cluster.

One actor for each process, and one placement group for each serving group, whose bundles are pinned to the
group's nodes: a group starts whole or not at all, and what it runs on belongs to nobody else meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hexgen2.deploy import guard
from hexgen2.deploy.processes import GRACE_S, ProcessLauncher
from hexgen2.deploy.raycluster.actor import ProcessActor, carried
from hexgen2.deploy.raycluster.connection import ANSWER_S, RayCluster, awaited, trouble
from hexgen2.deploy.raycluster.nodes import OPTION, RayNode, claims
from hexgen2.deploy.raycluster.watch import NodeWatch
from hexgen2.deploy.spec import ProcessSpec
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError

NEWS_S = 1.0
"""How long an actor may wait for something to tell before it answers."""
SILENCE_S = 5.0
"""An actor that has not answered for this long is taken for dead."""
RETRY_S = 0.2
PLACE_S = 30.0
"""How long to wait for resources that somebody else still holds."""
KILLED = 128 + 9


@dataclass(eq=False)
class RayProcess:
    """A process that an actor holds."""

    spec: ProcessSpec
    node: RayNode
    actor: Any
    placement: Any
    log: Path
    exit_code: int | None = None
    words: tuple[str, ...] = ()
    pump: asyncio.Task[None] | None = field(default=None, repr=False)

    async def wait(self) -> None:
        if self.pump is not None:
            await asyncio.shield(self.pump)


class RayLauncher(ProcessLauncher[RayProcess]):
    """Each process in an actor on its node, its output in a file of ``run_dir`` on this one.

    Nothing outlives this process: its actors are not detached, so Ray ends them when it dies, and the guards
    end their engines when their actor is gone.
    """

    def __init__(
        self,
        run_dir: Path,
        ray: RayCluster,
        cluster: Cluster,
        watch: NodeWatch,
        grace_s: float = GRACE_S,
        claim: bool = True,
    ) -> None:
        """``watch`` knows where the plan's nodes are; ``claim``: whether processes take the GPUs and cores of
        the plan from Ray."""
        super().__init__(run_dir, grace_s)
        self._ray = ray
        self._cluster = cluster
        self._watch = watch
        self._claim = claim
        self._actor = ray.ray.remote(ProcessActor)

    def absent(self, group_id: str) -> Collection[str]:
        """The nodes of a group that are gone, or back at another address than its processes have."""
        assert self._deployment is not None, "nothing was started"
        found = self._watch.places.found
        return {
            spec.node
            for spec in self._deployment.group(group_id)
            if not self._watch.alive(spec.node) or found[spec.node].address != spec.host
        }

    async def _check(self, processes: Sequence[ProcessSpec]) -> None:
        self._watch.places.require(spec.node for spec in processes)
        if self._claim:
            for spec in processes:
                claims(self._cluster, self._watch.places.found, spec.node, spec.gpus)

    async def _launch(self, processes: Sequence[ProcessSpec]) -> list[RayProcess]:
        self._watch.places.require(spec.node for spec in processes)
        nodes = [self._watch.places.found[spec.node] for spec in processes]
        placement = await self._place(processes, nodes)
        started: list[RayProcess] = []
        try:
            for bundle, (spec, node) in enumerate(zip(processes, nodes, strict=True)):
                started.append(self._hold(spec, node, placement, bundle))
            await asyncio.gather(*(self._start_one(one) for one in started))
        except BaseException:
            await asyncio.shield(self._release(placement, [one.actor for one in started]))
            raise
        for one in started:
            one.pump = asyncio.create_task(self._follow(one), name=f"follow-{one.spec.name}")
        return started

    async def _end(self, running: Collection[RayProcess]) -> None:
        await asyncio.shield(self._end_all(running))

    async def _end_all(self, running: Collection[RayProcess]) -> None:
        await asyncio.gather(*(self._finish(one) for one in running))
        for placement in {id(one.placement): one.placement for one in running}.values():
            await self._release(placement, [one.actor for one in running if one.placement is placement])

    # One group

    async def _place(self, processes: Sequence[ProcessSpec], nodes: Sequence[RayNode]) -> Any:
        """A placement group with a bundle for each process, on its node. InputError where it does not come
        about."""
        from ray.util import placement_group

        bundles = [
            {f"node:{node.address}": 0.001, **self._claims(spec)}
            for spec, node in zip(processes, nodes, strict=True)
        ]
        placement = placement_group(
            bundles,
            strategy="PACK",
            name=f"hexgen2-{processes[0].group_id}",
            bundle_label_selector=[{"ray.io/node-id": node.id} for node in nodes],
        )
        began = time.monotonic()
        try:
            while not await asyncio.to_thread(placement.wait, 1):
                self._watch.places.require(spec.node for spec in processes)
                gone = [spec.node for spec in processes if not self._watch.alive(spec.node)]
                if gone:
                    raise InputError(OPTION, f"node {gone[0]}", "is gone", "wait for its return")
                if time.monotonic() - began >= PLACE_S:
                    raise self._scarce(processes, nodes)
        except BaseException:
            await asyncio.shield(self._release(placement, ()))
            raise
        return placement

    def _claims(self, spec: ProcessSpec) -> dict[str, float]:
        found = self._watch.places.found
        return claims(self._cluster, found, spec.node, spec.gpus) if self._claim else {}

    def _scarce(self, processes: Sequence[ProcessSpec], nodes: Sequence[RayNode]) -> InputError:
        """Which node has too little left for a group."""
        left = self._ray.available()
        for node in {one.id: one for one in nodes}.values():
            here = [spec for spec, at in zip(processes, nodes, strict=True) if at.id == node.id]
            for name in ("GPU", "CPU"):
                wanted = sum(self._claims(spec).get(name, 0.0) for spec in here)
                if wanted > left.get(node.id, {}).get(name, 0.0):
                    return InputError(
                        OPTION,
                        f"node {here[0].node}",
                        f"has {left.get(node.id, {}).get(name, 0.0):g} {name}s free in Ray, and "
                        f"{processes[0].group_id} needs {wanted:g}",
                        "end what holds them (`ray status -v` shows what each node has left)",
                    )
        return InputError(
            OPTION,
            f"group {processes[0].group_id}",
            f"was not given its place within {PLACE_S:g} s",
            "look at `ray status`",
        )

    def _hold(self, spec: ProcessSpec, node: RayNode, placement: Any, bundle: int) -> RayProcess:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        taken = self._claims(spec)
        actor = self._actor.options(
            name=None,
            num_cpus=taken.get("CPU", 0),
            num_gpus=taken.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=placement, placement_group_bundle_index=bundle
            ),
        ).remote(spec.model_dump_json(), self._grace_s, sys.executable, carried())
        return RayProcess(spec, node, actor, placement, self.run_dir / spec.log_name)

    async def _start_one(self, one: RayProcess) -> None:
        one.log.write_bytes(b"")
        try:
            problem = await awaited(one.actor.start.remote(), ANSWER_S)
        except self._ray.ray.exceptions.RayError as error:
            raise trouble(one.node, error) from None
        except TimeoutError:
            raise InputError(
                OPTION,
                f"node {one.spec.node}",
                f"has not started {one.spec.name} within {ANSWER_S:g} s",
                "look at `ray status`",
            ) from None
        if problem is not None:
            raise InputError(f"engine {one.spec.name}", f"node {one.spec.node}", problem, "serve the plan anew")

    # One process

    async def _follow(self, one: RayProcess) -> None:
        """Write what a process puts out, until it has ended or its actor does not answer any more."""
        seen, heard = 0, time.monotonic()
        with one.log.open("ab", buffering=0) as log:
            while one.exit_code is None:
                try:
                    begin, output, code = await awaited(one.actor.news.remote(seen, NEWS_S), SILENCE_S)
                except self._ray.ray.exceptions.ActorUnavailableError:
                    if time.monotonic() - heard < SILENCE_S:
                        await asyncio.sleep(RETRY_S)
                        continue
                    self._lose(one, f"node {one.spec.node} ({one.node.address}) does not answer")
                except TimeoutError:
                    self._lose(one, f"node {one.spec.node} ({one.node.address}) does not answer")
                except self._ray.ray.exceptions.RayError as error:
                    self._lose(one, f"its actor on node {one.spec.node} is gone: {_first_line(error)}")
                else:
                    heard = time.monotonic()
                    missed = f"\n[{begin - seen} bytes were not fetched in time]\n" if begin > seen else ""
                    with suppress(OSError):  # a full disk here is no end of the process there
                        log.write(missed.encode() + output)
                    seen, one.exit_code = begin + len(output), code

    def _lose(self, one: RayProcess, words: str) -> None:
        """The actor is gone, so is the process; whether the node is, will be seen."""
        with suppress(OSError), one.log.open("ab") as log:
            log.write(f"[{words}]\n".encode())
        self._watch.doubt(one.node)
        one.words, one.exit_code = (words,), KILLED

    async def _finish(self, one: RayProcess) -> None:
        """End a process in its own time, as far as its actor still hears."""
        assert one.pump is not None, "it was started"
        if one.exit_code is None:
            with suppress(self._ray.ray.exceptions.RayError, TimeoutError):
                await awaited(one.actor.end.remote(), SILENCE_S)
            await asyncio.wait((one.pump,), timeout=self._grace_s + guard.LAST_WORDS_S + 1.0)
        one.pump.cancel()
        await asyncio.wait((one.pump,))

    async def _release(self, placement: Any, actors: Sequence[Any]) -> None:
        """Give back what a group held."""
        from ray.util import remove_placement_group

        def release() -> None:
            for actor in actors:
                self._ray.ray.kill(actor, no_restart=True)
            remove_placement_group(placement)

        with suppress(TimeoutError, self._ray.ray.exceptions.RayError):
            await asyncio.wait_for(asyncio.to_thread(release), SILENCE_S)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
