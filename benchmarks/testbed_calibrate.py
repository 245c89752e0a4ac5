"""Calibration on the test bed: each type of device by a real engine under its quota, what it takes to go on
from another engine's KV cache, and each rate of link by real transfers between two nodes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from testbed_clusters import WORKLOAD, cluster, cost_model, served_model
from testbed_fleet import engines
from testbed_plans import equal_plan

from hexgen2.calibrate.drive import Engine, Grid, measure
from hexgen2.calibrate.fit import Fit, Measured
from hexgen2.calibrate.handoff import measure_handoff
from hexgen2.calibrate.live import fit_live
from hexgen2.calibrate.local import layout_of
from hexgen2.cost import Efficiencies
from hexgen2.deploy.testbed import Bed, cores_of
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.gpu import GpuType
from hexgen2.specs.plan import Plan, Role

PORT = 7000
LINK_GBPS = 1.0
HANDED_OVER = (64, 256, 480)
"""Tokens of the prompts whose KV caches are handed over."""

LARGEST, LEAST, LONGEST_S = 2**22, 2**20, 0.5
"""Bytes of the largest read: about the KV cache of a prompt, or what a slow link carries in half a second, but
at least a megabyte."""

START_S = 30.0
Tell = Callable[[str], None]
Points = Mapping[str, tuple[list[Measured], Fit]]
"""By type of device: what was measured, and the fit."""


def calibrate(kinds: Mapping[str, Role], grid: Grid, folder: Path, tell: Tell) -> Points:
    """Measure an engine in the given role on a device of each type, all at once as they will serve; fit each
    type. To those that decode, one more engine hands KV caches over."""
    nodes = {f"n{place}": kind for place, kind in enumerate(kinds)}
    roles = {node: kinds[kind] for node, kind in nodes.items()}
    decoding = [kind for kind, role in kinds.items() if role == "decode"]
    if decoding:
        nodes["source"], roles["source"] = decoding[0], "prefill"
    where = cluster("calibration", nodes, gbps=LINK_GBPS)
    plan = equal_plan(where, roles, WORKLOAD, cost_model(Efficiencies()))
    with Bed(where) as bed:
        measured = asyncio.run(_measure(bed, plan, grid, folder, tell))
    fits = {kind: fit_live(kind, points) for kind, points in measured.items()}
    return {
        kind.name: (points, _with_handoff(kind, fits[kind], points, fits)) for kind, points in measured.items()
    }


def _with_handoff(kind: GpuType, fit: Fit, points: list[Measured], fits: Mapping[GpuType, Fit]) -> Fit:
    """What taking over a KV cache costs a type on which it was not measured: in proportion to the processor, as
    on the first one where it was. Else the planner would take it to cost nothing."""
    if any(one.phase == "handoff" for one in points):
        return fit
    for other, known in fits.items():
        if known.efficiency.handoff_overhead_s:
            seconds = known.efficiency.handoff_overhead_s * cores_of(other) / cores_of(kind)
            changed = fit.efficiency.model_copy(update={"handoff_overhead_s": seconds})
            return replace(fit, efficiency=changed)
    return fit


async def _measure(bed: Bed, plan: Plan, grid: Grid, folder: Path, tell: Tell) -> dict[GpuType, list[Measured]]:
    model = served_model()
    async with engines(bed, plan, folder) as deployment:
        bed.limit()

        targets = {
            group.id: Engine(deployment.coordinator.engine(group.id).url, model, layout_of(plan, group.id))
            for group in plan.groups
            if group.role != "prefill"
        }

        async def one(engine: Engine) -> list[Measured]:
            name = engine.layout[0].gpu.name
            return await measure(engine, grid, lambda line: tell(f"{name} {line}"))

        measured = await asyncio.gather(*map(one, targets.values()))
        found = dict(zip(targets, measured, strict=True))
        link = bed.wiring.cluster.node_link(0, 1)
        for route in plan.routes:
            source = deployment.coordinator.engine(route.source).url
            points = await measure_handoff(source, targets[route.target], link, HANDED_OVER, grid.repeats + 2)
            tell(f"hand-over to {route.target}: {points[-1].seconds * 1e3:.4g} ms")
            found[route.target] += points
        return {targets[group].layout[0].gpu: points for group, points in found.items()}


def measure_links(bed: Bed, tell: Tell) -> Cluster:
    """The bed's cluster with what NIXL gets out of its links: one link of each rate is measured."""
    nominal = bed.wiring.cluster
    names = [node.name for node in nominal.nodes]
    found: dict[float, dict[str, float]] = {}
    links = []
    for a, b in combinations(range(len(names)), 2):
        rate = nominal.node_link(a, b).bandwidth
        if rate not in found:
            found[rate] = _measure_link(bed, a, b, round(min(LARGEST, max(LEAST, LONGEST_S * rate))))
            told = f"{found[rate]['gbps']:.4g} Gb/s, {found[rate]['latency_ms']:.3g} ms"
            tell(f"a link of {rate * 8e-9:g} Gb/s carries {told}")
        links.append({"between": [names[a], names[b]], **found[rate]})
    return parse_cluster({**nominal.document(), "network": {"links": links}}, nominal.name)


def _measure_link(bed: Bed, a: int, b: int, largest: int) -> dict[str, float]:
    """Of the link between two nodes, by reads of at most so many bytes: gbps and latency_ms."""
    command = (sys.executable, "-m", "hexgen2.cli.main", "calibrate")
    address = f"{bed.wiring.address(a)}:{PORT}"
    reading = bed.inside(b, (*command, "--link", address, "--largest", str(largest), "--json"))
    with _running(bed.inside(a, (*command, "--serve-links", str(PORT))), bed.environment(a)):
        deadline = time.monotonic() + START_S
        while True:
            environment = os.environ | bed.environment(b)
            done = subprocess.run(reading, env=environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                document = json.loads(done.stdout)
                return {key: float(document[key]) for key in ("gbps", "latency_ms")}
            if time.monotonic() > deadline:
                raise RuntimeError(f"the link to {address} cannot be measured: {done.stderr}")
            time.sleep(0.5)


@contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    with subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
