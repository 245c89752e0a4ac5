"""Engines of a plan, emulated in one process: `python -m hexgen2.emulator.fleet --plan PLAN --at p0=8101`.

Each engine takes the times that the cost model gives its group (layout, GPUs, profile), has the group's KV
memory and batch limits, and answers with made-up tokens. KV caches move over the plan's links in the time that
these need, transfers that share a link or a NIC sharing it fairly: the simulator's network, in real time.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from hexgen2.cost import CostModel, shape
from hexgen2.cost.profile_files import load_efficiencies
from hexgen2.emulator.server import EmulatedEngine, EmulatorConfig
from hexgen2.emulator.timing import ModelledTiming
from hexgen2.simulator.network import Network, network_of
from hexgen2.simulator.placement import placement
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan, load_plan

LEASE_S = 120.0


class RealTime:
    """The running event loop as the clock of a network; with a slowdown its seconds are longer."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self._slowdown = slowdown
        self._loop = asyncio.get_running_loop()

    @property
    def now(self) -> float:
        return time.monotonic() / self._slowdown

    def at(self, time: float, call: Callable[[Any], None], argument: Any = None) -> None:
        self._loop.call_later(max(0.0, (time - self.now) * self._slowdown), call, argument)


@dataclass(frozen=True)
class SharedLinks:
    """Transfers into one decode group over the plan's network."""

    network: Network
    target: str
    routes: frozenset[str]

    async def move(self, source: str, tokens: int) -> None:
        """As long as the links need; nothing from a group that the plan has no route from (the coordinator may
        choose any pair when engines are down)."""
        if source not in self.routes:
            return
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def call(_: Any) -> None:
            if not arrived.done():  # its request may have gone meanwhile
                arrived.set_result(None)

        self.network.start((source, self.target), float(tokens), call, None)
        await arrived


def engines_of(
    plan: Plan, cost: CostModel, model_names: Sequence[str] = ("emulated",), slowdown: float = 1.0
) -> dict[str, EmulatedEngine]:
    """An engine for every group of a plan; to be called in the event loop that they will run in."""
    network, token_bytes = network_of(plan, cost.model, RealTime(slowdown))
    engines: dict[str, EmulatedEngine] = {}
    for group in plan.groups:
        compiled = cost.compiled(shape(plan.cluster, placement(plan, group)))
        sources = frozenset(source for source, target in token_bytes if target == group.id)
        arriving = [size for (_, target), size in token_bytes.items() if target == group.id]
        settings, prefill = cost.settings, group.role == "prefill"
        budget = group.token_budget or settings.token_budget
        engines[group.id] = EmulatedEngine(
            EmulatorConfig(
                model_names=tuple(model_names),
                role=group.role,
                name=group.id,
                timing=ModelledTiming(compiled.costs, prefill, slowdown),
                max_batch=group.max_batch,
                kv_bytes_per_token=round(arriving[0] if arriving else cost.model.kv_bytes_per_token),
                kv_tokens=compiled.max_tokens,
                # A decoding pipeline takes one micro-batch per stage, each with a budget of its own.
                token_budget=budget * (1 if prefill else len(compiled.costs)),
                block_size=settings.block_size,
                lease_s=LEASE_S * slowdown,
                transfers=SharedLinks(network, group.id, sources) if sources else None,
            )
        )
    return engines


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hexgen2.emulator.fleet", description=__doc__)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--model", help="the plan's model, where it lies elsewhere")
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--served-model-name", nargs="+", default=["emulated"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--at", nargs="+", required=True, metavar="GROUP=PORT", help="the groups whose engines run here"
    )
    parser.add_argument("--slowdown", type=float, default=1.0)
    return parser.parse_args(argv)


async def _serve(arguments: argparse.Namespace) -> None:
    plan = load_plan(arguments.plan)
    ports: Mapping[str, str] = dict(place.split("=", 1) for place in arguments.at)
    cost = CostModel(load_model(arguments.model or plan.model), load_efficiencies(arguments.profile))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engines = engines_of(plan, cost, arguments.served_model_name, arguments.slowdown)
    async with AsyncExitStack() as stack:
        for group, port in ports.items():
            await stack.enter_async_context(engines[group].running(int(port), arguments.host))
        print(f"{len(ports)} emulated engines", file=sys.stderr, flush=True)
        await stop.wait()


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; exit code 2 for a mistake in the arguments or a port that is taken."""
    try:
        asyncio.run(_serve(_arguments(argv)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.strerror or error}; give free ports", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
