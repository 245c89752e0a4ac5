"""A plan under load: the groups, the network and the coordinator's choice of paths, wired together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hexgen2.cost.capacity import handover_wait
from hexgen2.cost.layout import shape
from hexgen2.cost.replica import Compiled, CostModel
from hexgen2.simulator.batching import Engine
from hexgen2.simulator.events import Events
from hexgen2.simulator.load import Requests
from hexgen2.simulator.network import network_of
from hexgen2.simulator.placement import placement
from hexgen2.simulator.prefill import PrefillGroup
from hexgen2.simulator.result import SimulationResult, summarise
from hexgen2.simulator.sequence import Sequence
from hexgen2.specs.classes import RequestSize
from hexgen2.specs.places import PromptsAhead, places, prompts_at_most
from hexgen2.specs.plan import Group, Plan, Slo
from hexgen2.specs.routing import ClassRouter, Path, SmoothRouter, engine_load

PROGRESS_EVERY = 500
"""Requests between two calls of the progress function."""


def simulate(
    plan: Plan,
    cost: CostModel,
    requests: Requests,
    *,
    slo: Slo | None = None,
    load_correction: float = 0.5,
    hold_back: bool = True,
    max_tokens_known: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """What becomes of these requests on this plan.

    ``cost`` is the cost model of the plan's model. ``slo``: targets to count goodput by, the plan's by default.
    ``load_correction``: how far live load bends the shares, the coordinator's setting. ``hold_back``:
    as the coordinator does, requests wait while the engines that may answer them have no place, and a decode
    group is sent at most ``max_batch`` requests at a time, see `Engine`. ``max_tokens_known``: requests name
    the length of their answer as ``max_tokens``, as `bench` does; it counts where the plan routes by class.
    ``progress`` is called with the requests that have ended and all of them. Deterministic: equal arguments
    give equal results.
    """
    simulation = _Simulation(plan, cost, requests, load_correction, hold_back, max_tokens_known, progress)
    return simulation.run(plan.slo if slo is None else slo)


class _Simulation:
    def __init__(
        self,
        plan: Plan,
        cost: CostModel,
        requests: Requests,
        load_correction: float,
        hold_back: bool,
        max_tokens_known: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._plan = plan
        self._cost = cost
        self._hold_back = hold_back
        self._progress = progress
        self._events = Events()
        self._compiled = {
            group.id: cost.compiled(shape(plan.cluster, placement(plan, group))) for group in plan.groups
        }
        self._prefill = {group.id: self._prefill_group(group) for group in plan.role_groups("prefill")}
        self._engines = {group.id: self._engine(group) for group in plan.groups if group.role != "prefill"}
        self._network, self._bytes_per_token = network_of(plan, cost.model, self._events)
        paths = [Path(route.source, route.target, route.share, route.class_shares) for route in plan.routes]
        paths += [
            Path(None, group.id, group.share, group.class_shares) for group in plan.role_groups("colocated")
        ]
        self._router = ClassRouter(paths, load_correction, plan.classes)
        self._by_max_tokens = max_tokens_known
        # As the coordinator counts: a request is bound for the engine that answers from the choice to its end,
        # and for the one that computes its prompt until that is done.
        self._bound_for = {group.id: 0 for group in plan.groups}
        self._max_batch = {group.id: group.max_batch for group in plan.groups}
        self._ahead = {group.id: PromptsAhead() for group in plan.groups}
        for target, most in prompts_at_most(paths, self._max_batch).items():
            self._ahead[target].most = most
        self._held: dict[tuple[SmoothRouter, ...], deque[Sequence]] = {}
        self._sequences = [
            Sequence(number, inputs, outputs, arrival)
            for number, (arrival, inputs, outputs) in enumerate(
                zip(
                    requests.arrivals_s.tolist(),
                    requests.inputs.tolist(),
                    requests.outputs.tolist(),
                    strict=True,
                )
            )
        ]
        self._ended = 0
        self._kv_bytes = 0.0

    def run(self, slo: Slo) -> SimulationResult:
        if self._sequences:
            self._events.at(self._sequences[0].arrival, self._arrive, 0)
        while self._events.step():
            pass
        if self._progress:
            self._progress(self._ended, len(self._sequences))
        first = self._sequences[0].arrival if self._sequences else 0.0
        span = self._events.now - first
        return summarise(self._sequences, self._router.paths, self._kv_bytes, slo, self._group_figures(span))

    def _arrive(self, number: int) -> None:
        """A request is here: let it in or hold it back, and wait for the next one."""
        if number + 1 < len(self._sequences):
            self._events.at(self._sequences[number + 1].arrival, self._arrive, number + 1)
        sequence = self._sequences[number]
        size = RequestSize(sequence.inputs, sequence.outputs if self._by_max_tokens else None)
        routers = self._router.routers(size)
        if routers in self._held or not self._let_in(sequence, routers):
            self._held.setdefault(routers, deque()).append(sequence)

    def _let_in(self, sequence: Sequence, routers: tuple[SmoothRouter, ...]) -> bool:
        """Send a request along a path; False where no engine that may answer it has a place."""
        path = routers[0].choose(self._has_place, self._loads(), up=_everywhere)
        if path is not None:
            self._begin(sequence, path)
        return path is not None

    def _has_place(self, path: Path) -> bool:
        if not self._hold_back:
            return True
        batch = self._max_batch[path.target]
        return self._bound_for[path.target] < places(batch) + self._ahead[path.target].number(batch)

    def _loads(self) -> dict[str, float]:
        used = {name: group.kv_used for name, group in self._prefill.items()}
        used |= {name: engine.kv_used for name, engine in self._engines.items()}
        return {name: engine_load(n, self._max_batch[name], used[name]) for name, n in self._bound_for.items()}

    def _begin(self, sequence: Sequence, path: Path) -> None:
        prompt_fits = path.prefill is None or sequence.inputs <= self._prefill[path.prefill].max_tokens
        if not prompt_fits or sequence.inputs + sequence.outputs > self._engines[path.target].max_tokens:
            self._count_ended()  # the engine refuses it: it could never hold it
            return
        sequence.path, sequence.chosen = path, self._events.now
        self._bound_for[path.target] += 1
        if path.prefill is None:
            sequence.pending = sequence.inputs
            self._engines[path.target].submit(sequence)
        else:
            self._bound_for[path.prefill] += 1
            self._prefill[path.prefill].submit(sequence)

    def _prompt_done(self, sequence: Sequence) -> None:
        path: Path = sequence.path
        assert path.prefill is not None
        self._bound_for[path.prefill] -= 1
        self._ahead[path.target].computed(sequence.prefilled - sequence.chosen)
        self._engines[path.target].submit(sequence)

    def _fetch(self, sequence: Sequence) -> None:
        sequence.transfer_start = self._events.now
        route = sequence.path.groups
        self._network.start(route, float(sequence.inputs), self._transferred, sequence)

    def _transferred(self, sequence: Sequence) -> None:
        sequence.transferred = self._events.now
        path: Path = sequence.path
        assert path.prefill is not None
        self._kv_bytes += sequence.inputs * self._bytes_per_token[path.prefill, path.target]
        self._prefill[path.prefill].release(sequence)
        wait_s = handover_wait(self._compiled[path.target].costs, sequence.inputs)
        if wait_s:
            self._events.at(self._events.now + wait_s, self._engines[path.target].arrived, sequence)
        else:
            self._engines[path.target].arrived(sequence)

    def _answered(self, sequence: Sequence) -> None:
        target = sequence.path.target
        self._bound_for[target] -= 1
        if sequence.path.prefill is not None:
            self._ahead[target].answered(self._events.now - sequence.prefilled)
        self._count_ended()
        for routers, held in sorted(self._held.items(), key=lambda lane: lane[1][0].number):
            while held and self._let_in(held[0], routers):
                held.popleft()
            if not held:
                del self._held[routers]

    def _count_ended(self) -> None:
        self._ended += 1
        if self._progress and self._ended % PROGRESS_EVERY == 0:
            self._progress(self._ended, len(self._sequences))

    def _prefill_group(self, group: Group) -> PrefillGroup:
        compiled = self._compiled[group.id]
        settings = self._cost.settings
        if group.token_budget is not None:
            settings = replace(settings, token_budget=group.token_budget)
        return PrefillGroup(self._events, compiled, settings, group.max_batch, self._prompt_done)

    def _engine(self, group: Group) -> Engine:
        compiled: Compiled = self._compiled[group.id]
        fetch = self._fetch if group.role == "decode" else None
        return Engine(
            self._events,
            compiled,
            self._cost.settings,
            group.max_batch,
            self._answered,
            fetch,
            hold_back=self._hold_back,
        )

    def _group_figures(self, span: float) -> dict[str, dict[str, Any]]:
        """What each group did, for the results' ``per_group``; ``busy``: part of the time it computed."""
        figures: dict[str, dict[str, Any]] = {}
        size = self._cost.settings.block_size
        for name, prefill in self._prefill.items():
            figures[name] = {
                "role": "prefill",
                "requests": prefill.requests,
                "prompt_tokens": prefill.tokens,
                "output_tokens": 0,
                "busy": prefill.busy_s / span if span else 0.0,
                "mean_batch": prefill.requests / prefill.batches if prefill.batches else 0.0,
                "preemptions": 0,
                "peak_kv_tokens": prefill.peak_blocks * size,
            }
        for name, engine in self._engines.items():
            figures[name] = {
                "role": self._plan.group_by_id[name].role,
                "requests": engine.requests,
                "prompt_tokens": engine.prompt_tokens,
                "output_tokens": engine.output_tokens,
                "busy": engine.busy_s / span if span else 0.0,
                "mean_batch": engine.sequence_steps / engine.steps if engine.steps else 0.0,
                "preemptions": engine.preemptions,
                "peak_kv_tokens": engine.blocks.peak * size,
            }
        return figures


def _everywhere(_: Path) -> bool:
    return True
