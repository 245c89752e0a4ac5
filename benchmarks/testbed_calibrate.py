"""Calibration on the test bed: the types of device by real engines under their quotas, what handing over KV
caches costs them, and each rate of link by real transfers between two nodes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

from testbed_clusters import WORKLOAD, cost_model, served_model
from testbed_fleet import engines
from testbed_plans import equal_plan

from hexgen2.calibrate.drive import Engine, Grid, measure
from hexgen2.calibrate.fit import Fit, Measured
from hexgen2.calibrate.handoff import Handoffs, measure_handoffs
from hexgen2.calibrate.live import fit_live
from hexgen2.calibrate.local import layout_of
from hexgen2.cost import Efficiencies
from hexgen2.deploy.testbed import Bed
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.gpu import GpuType
from hexgen2.specs.plan import Plan, Role

PORT = 7000
HANDED_OVER = (64, 448)
"""Tokens of the prompts whose KV caches are handed over."""

LARGEST, LEAST, LONGEST_S = 2**22, 2**20, 0.5
"""Bytes of the largest read: about the KV cache of a prompt, or what a slow link carries in half a second, but
at least a megabyte."""

LOAD = Grid(longest=560, tokens=2240, batch=4, repeats=1)
"""What engines do that are done before the others."""

START_S, MEASURE_S = 30.0, 60.0
"""How long the other end of a link may take to start; and a measurement, before it is begun anew (a transfer
may hang)."""

Tell = Callable[[str], None]
Points = Mapping[str, tuple[list[Measured], Fit]]
"""By type of device: what was measured, and the fit."""


def calibrate(setting: Cluster, grid: Grid, folder: Path, tell: Tell) -> Points:
    """Measure an engine on each of a setting's devices, all at once as they will serve, then hand-overs between
    devices in pairs; fit each type to all of its devices."""
    pairs = paired(setting)
    roles: dict[str, Role] = {}
    for source, target in pairs:
        roles |= {setting.nodes[source].name: "prefill", setting.nodes[target].name: "decode"}
    plan = equal_plan(setting, roles, WORKLOAD, cost_model(Efficiencies()))
    with Bed(setting) as bed:
        return asyncio.run(_measure(bed, plan, pairs, grid, folder, tell))


def paired(setting: Cluster) -> list[tuple[int, int]]:
    """Nodes in pairs, those with the fastest link between them first; every node once."""
    links = sorted(
        combinations(range(len(setting.nodes)), 2), key=lambda pair: -setting.node_link(*pair).bandwidth
    )
    found: list[tuple[int, int]] = []
    for pair in links:
        if not any(set(pair) & set(other) for other in found):
            found.append(pair)
    return found


async def _measure(
    bed: Bed, plan: Plan, pairs: Sequence[tuple[int, int]], grid: Grid, folder: Path, tell: Tell
) -> Points:
    model = served_model()
    async with engines(bed, plan, folder) as deployment:
        bed.limit()
        node_of = {group.gpus[0].partition("/")[0]: group.id for group in plan.groups}
        targets = [
            Engine(deployment.coordinator.engine(group).url, model, layout_of(plan, group))
            for group in (node_of[node.name] for node in plan.cluster.nodes)
        ]
        points = await _grids(targets, grid, tell)

        async def pair(source: int, target: int) -> list[tuple[int, int, Handoffs]]:
            link = bed.wiring.cluster.node_link(source, target)
            found = []
            for a, b in ((source, target), (target, source)):
                each = await measure_handoffs(targets[a], targets[b], link, HANDED_OVER, grid.repeats)
                tell(f"hand-overs from {a} to {b}: {_words(each)}")
                found.append((a, b, each))
            return found

        handed = [one for found in await asyncio.gather(*(pair(*each) for each in pairs)) for one in found]
    types: dict[GpuType, list[int]] = {}
    for place, engine in enumerate(targets):
        types.setdefault(engine.layout[0].gpu, []).append(place)
    fitted: dict[str, tuple[list[Measured], Fit]] = {}
    for gpu, places in types.items():
        measured = [one for place in places for one in points[place]]
        # Of a pair of unlike devices each type has its own side.
        handoffs = [
            Handoffs(each.sent if a in places else (), each.received if b in places else ())
            for a, b, each in handed
        ]
        fitted[gpu.name] = measured, fit_live(gpu, measured, handoffs)
    return fitted


async def _grids(targets: Sequence[Engine], grid: Grid, tell: Tell) -> list[list[Measured]]:
    """Every engine's grid. One that is done goes on until all are, unheard, so that each is measured beside as
    much other work as it will have."""
    going = len(targets)

    async def one(place: int, engine: Engine) -> list[Measured]:
        nonlocal going
        name = f"{engine.layout[0].gpu.name} {place}"
        found = await measure(engine, grid, lambda line: tell(f"{name} {line}"), seed=place)
        going -= 1
        while going:
            await measure(engine, LOAD, seed=place)
        return found

    return list(await asyncio.gather(*(one(place, engine) for place, engine in enumerate(targets))))


def _words(handoffs: Handoffs) -> str:
    return "; ".join(
        f"{sent.tokens} tokens: sending {_ms(sent.lost_s)}, taking over {_ms(received.lost_s)}, "
        f"waiting {_ms(received.wait_s)} ms"
        for sent, received in zip(handoffs.sent, handoffs.received, strict=True)
    )


def _ms(seconds: Sequence[float]) -> str:
    return "/".join(f"{1e3 * one:.1f}" for one in seconds)


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
        deadline = time.monotonic() + START_S + MEASURE_S
        environment, problem = os.environ | bed.environment(b), ""
        while time.monotonic() < deadline:
            try:
                done = subprocess.run(
                    reading, env=environment, capture_output=True, text=True, check=False, timeout=MEASURE_S
                )
            except subprocess.TimeoutExpired:
                problem = f"it takes more than {MEASURE_S:g} s"
                continue
            if done.returncode == 0:
                document = json.loads(done.stdout)
                return {key: float(document[key]) for key in ("gbps", "latency_ms")}
            problem = done.stderr
            time.sleep(0.5)
        raise RuntimeError(f"the link to {address} cannot be measured: {problem}")


@contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    with subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
