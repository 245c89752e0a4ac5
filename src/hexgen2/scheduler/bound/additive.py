"""An upper bound on every plan's objective under the cost model, by one linear program (docs/bound.md).

The idea: a stage of t GPUs with l of the model's L layers, at rate R, is busy at most all the time, so
R·l/L ≤ (what the stage could do if it held all layers)/1. Summed over a group's stages: its rate is at most the
sum of its stages' rates *per whole model*, and the part R·l/L is also the part of the KV cache that this stage
sends or receives. So GPUs contribute additively, whatever the groups are, and what they contribute crosses the
network from where they stand.

- prefill: a GPU of kind k contributes at most its best rate over all TP sizes, at the largest batch;
- decode and colocated groups of one stage: the cost model's own rate of that layout, per GPU, on the best link;
- of several stages: at x sequences per micro-batch; those need KV memory, b = x·S ≤ max_batch sequences share
  the group's memory with one copy of the weights, so over the stages Σ (t·M − x·(kv + W/max_batch)) ≥ 0.
  x is cut into levels, taking the rate at a level's upper and the memory at its lower end.

Links and NICs between kinds of node limit what crosses, in the aggregate of all nodes of a kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from hexgen2.cost.layout import StageShape
from hexgen2.cost.stage import StageCost, stage_cost
from hexgen2.scheduler.bound.groups import tp_sizes
from hexgen2.scheduler.bound.long import LEVEL_RATIO
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.times import held_bytes, pipeline_memory
from hexgen2.scheduler.columns import FINE_NODES, Kinds
from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.specs.gpu import Link

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """One layer of the model on a stage of GPUs of a kind; ``steps`` is the per-stage overhead to leave out."""

    costs: tuple[StageCost, ...]
    steps: float

    def seconds(self, tokens: float, squares: float, context: float) -> float:
        """The least time of any of the model's sorts of layer."""
        return min(cost.seconds(tokens, squares, context, 0.0) for cost in self.costs) - self.steps

    def mean_seconds(self, decoding: float, tokens: float, squares: float, context: float) -> float:
        """The least mean time over iterations of which some carry prompts beside the ``decoding`` sequences and
        others do not; ``tokens`` and ``squares`` are means.

        A time that is convex in the work is in the mean no less than that of the mean work. The reading of
        experts is not convex: prompts touch them all at once, in few iterations. It counts as without prompts.
        """
        return (
            min(
                max(
                    replace(cost, expert_read_s=0.0).seconds(tokens, squares, context, 0.0),
                    cost.seconds(decoding, 0.0, context, 0.0),
                )
                for cost in self.costs
            )
            - self.steps
        )


@dataclass
class _Rows:
    """A linear program under construction: rows of terms ≤ limit."""

    variables: int = 0
    rows: list[tuple[dict[int, float], float]] = field(default_factory=list)

    def new(self) -> int:
        self.variables += 1
        return self.variables - 1

    def add(self, terms: dict[int, float], limit: float) -> None:
        self.rows.append((terms, limit))


def additive_bound(evaluator: Evaluator) -> float:
    """Requests/s that no plan of the problem exceeds."""
    problem = evaluator.problem
    fine = len(evaluator.topology.counts) <= FINE_NODES
    kinds = Kinds(evaluator.topology, by_community=fine)
    moments = evaluator.values.moments
    number = len(kinds.nodes)
    sizes = tp_sizes(problem, Places.of_kinds(kinds))
    layers = {shape: layer_of(evaluator, kinds, *shape) for shape in product(range(number), sizes)}
    types = [kinds.topology.types[nodes[0]] for nodes in kinds.nodes]
    usable = [pipeline_memory(problem.cost, gpu, max(sizes)) for gpu in types]
    held = held_bytes(problem.cost, moments)
    lp = _Rows()
    gpus: list[dict[int, float]] = [{} for _ in range(number)]
    served = lp.new()
    prefilled = [lp.new() for _ in range(number)]
    decoded = [lp.new() for _ in range(number)]

    in_all: dict[int, float] = {}
    for kind in range(number):
        rates = [_prefill_rate(evaluator, layers[kind, tp], tp) for tp in sizes]
        taken = lp.new()
        gpus[kind][taken] = 1.0
        # Of more GPUs than KV heads, on several nodes, those of one node may send what the others hold too.
        copies = [max(1.0, tp / problem.model.kv_shards) for tp in sizes]
        sent = max(rate * copy for rate, copy in zip(rates, copies, strict=True))
        lp.add({prefilled[kind]: 1.0, taken: -sent}, 0.0)
        in_all |= {prefilled[kind]: 1.0, taken: -max(rates)}
    lp.add(in_all, 0.0)
    decode_rows: list[dict[int, float]] = [{decoded[kind]: 1.0} for kind in range(number)]
    served_row: dict[int, float] = {served: 1.0}
    for role in ("decode", "colocated"):
        for kind in range(number):
            for tp in sizes:
                rate = _one_stage_rate(evaluator, kinds, kind, tp, role)
                if rate > 0:
                    taken = lp.new()
                    gpus[kind][taken] = float(tp)
                    (decode_rows[kind] if role == "decode" else served_row)[taken] = -rate
        if role == "colocated" or problem.engine.decode_pp:
            for low, high in _levels(problem.cost.settings.max_batch):
                memory: dict[int, float] = {}
                for kind in range(number):
                    inside = [
                        tp for tp in sizes if tp <= kinds.count(kind)
                    ]  # stages of pipelines lie in a node
                    for tp in inside:
                        rate = _stage_rate(evaluator, layers[kind, tp], high, role)
                        taken = lp.new()
                        gpus[kind][taken] = float(tp)
                        (decode_rows[kind] if role == "decode" else served_row)[taken] = -rate
                        memory[taken] = low * held - tp * usable[kind]
                if low > 0:
                    lp.add(memory, 0.0)
    for row in decode_rows:
        lp.add(row, 0.0)
    lp.add(served_row, 0.0)
    for kind in range(number):
        lp.add(gpus[kind], float(len(kinds.nodes[kind]) * kinds.count(kind)))
    _network(lp, kinds, prefilled, decoded, moments.input * problem.model.kv_bytes_per_token)
    return _solve(lp, [served, *decoded])


def _levels(max_batch: int) -> Iterator[tuple[float, float]]:
    """(lower, upper] ends of sequences per micro-batch of pipelines, which have two micro-batches at least.

    The lowest level, up to one sequence, asks for no memory: a pipeline may run fewer sequences than stages.
    """
    low, high = 0.0, 1.0
    while low < max_batch / 2:
        yield low, min(high, max_batch / 2)
        low, high = high, high * LEVEL_RATIO


def _network(lp: _Rows, kinds: Kinds, prefilled: list[int], decoded: list[int], kv_bytes: float) -> None:
    """KV caches (whole requests' worth per second) from kind to kind: conserved, within links and NICs."""
    number = len(kinds.nodes)
    sent = [[lp.new() for _ in range(number)] for _ in range(number)]
    for kind in range(number):
        lp.add({prefilled[kind]: 1.0, **{sent[kind][other]: -1.0 for other in range(number)}}, 0.0)
        lp.add({prefilled[kind]: -1.0, **{sent[kind][other]: 1.0 for other in range(number)}}, 0.0)
        lp.add({decoded[kind]: 1.0, **{sent[other][kind]: -1.0 for other in range(number)}}, 0.0)
        lp.add({decoded[kind]: -1.0, **{sent[other][kind]: 1.0 for other in range(number)}}, 0.0)
        others = [other for other in range(number) if other != kind]
        for other in others:
            pair = np.ix_(kinds.nodes[kind], kinds.nodes[other])
            lp.add({sent[kind][other]: 1.0}, float(kinds.topology.bandwidth[pair].sum()) / kv_bytes)
        nic = kinds.topology.cluster.nic_bandwidth(kinds.nodes[kind][0]) * len(kinds.nodes[kind])
        if np.isfinite(nic) and others:
            lp.add({sent[kind][other]: 1.0 for other in others}, nic / kv_bytes)
            lp.add({sent[other][kind]: 1.0 for other in others}, nic / kv_bytes)


def _solve(lp: _Rows, gained: list[int]) -> float:
    goal = np.zeros(lp.variables)
    goal[gained] = -1.0
    entries = [(row, at, value) for row, (terms, _) in enumerate(lp.rows) for at, value in terms.items()]
    rows, columns, values = zip(*entries, strict=True)
    scales = np.zeros(len(lp.rows))
    np.maximum.at(scales, np.array(rows), np.abs(values))
    scales[scales == 0] = 1.0
    matrix = coo_matrix(
        (np.array(values) / scales[list(rows)], (rows, columns)), shape=(len(lp.rows), lp.variables)
    )
    limits = np.array([limit for _, limit in lp.rows]) / scales
    solved = linprog(goal, A_ub=matrix.tocsr(), b_ub=limits, method="highs")
    assert solved.status == 0, f"the bound's program ended with: {solved.message}"
    # The solver's feasibility tolerance is 1e-7 of each (scaled) row.
    return -float(solved.fun) * (1 + 1e-6)


def _best_link(kinds: Kinds, kind: int, tp: int) -> Link | None:
    """The best bandwidth and the best latency of any link at nodes of a kind; for more GPUs than a node has, of
    any link to another node."""
    if tp == 1:
        return None
    nodes = list(kinds.nodes[kind])
    bandwidth, latency = kinds.topology.bandwidth[nodes], kinds.topology.latency[nodes]
    if tp > kinds.count(kind):
        between = np.arange(bandwidth.shape[1]) != np.array(nodes)[:, None]
        bandwidth, latency = bandwidth[between], latency[between]
    return Link(bandwidth=float(bandwidth.max()), latency=float(latency.min()))


def layer_of(evaluator: Evaluator, kinds: Kinds, kind: int, tp: int) -> Layer:
    """One layer in the middle of the model."""
    problem = evaluator.problem
    gpu = kinds.topology.types[kinds.nodes[kind][0]]
    # Slower large all-reduces would break the claim's step 1, and what a stage pays once is no layer's: without
    # them no time is longer.
    efficiency = problem.cost.efficiencies.of(gpu).affine().model_copy(update={"prompt_overhead_s": 0.0})
    stage = StageShape(gpu, tp, 1, _best_link(kinds, kind, tp))
    model = problem.model
    sorts = [model]
    if model.moe is not None and model.moe.dense_layers:
        dense = model.moe.model_copy(update={"dense_layers": model.layers})
        sorts.append(model.model_copy(update={"moe": dense}))
    costs = tuple(stage_cost(sort, stage, efficiency, model.layers - 1, last=False) for sort in sorts)
    return Layer(costs, efficiency.step_overhead_s)


def _prefill_rate(evaluator: Evaluator, layer: Layer, tp: int) -> float:
    """Requests/s that one GPU contributes to prefill in stages of ``tp``, at the largest batch."""
    moments, settings = evaluator.values.moments, evaluator.problem.cost.settings
    batch = max(1, min(settings.max_batch, int(settings.token_budget // moments.input)))
    # A prompt beyond the budget is cut, where memory is scarce into smaller pieces than the budget: per token
    # none is faster than a whole budget.
    chunks = max(1.0, batch * moments.input / settings.token_budget)
    seconds = chunks * layer.seconds(batch * moments.input / chunks, batch * moments.input_sq / chunks, 0.0)
    return batch / (tp * evaluator.problem.model.layers * seconds)


def _one_stage_rate(evaluator: Evaluator, kinds: Kinds, kind: int, tp: int, role: str) -> float:
    """Requests/s of a group that is one stage of ``tp`` GPUs of a kind."""
    problem = evaluator.problem
    gpu = kinds.topology.types[kinds.nodes[kind][0]]
    layout = (StageShape(gpu, tp, problem.model.layers, _best_link(kinds, kind, tp)),)
    tpot = evaluator.targets.tpot_s if evaluator.targets else None
    if role == "decode":
        return problem.cost.decode_capacity(layout, problem.lengths, tpot).rps
    return problem.cost.colocated_capacity(layout, problem.lengths, tpot).rps


def _stage_rate(evaluator: Evaluator, layer: Layer, batch: float, role: str) -> float:
    """Requests/s that a pipeline stage contributes at ``batch`` sequences per micro-batch."""
    moments, settings = evaluator.values.moments, evaluator.problem.cost.settings
    scale = evaluator.problem.model.layers * moments.output
    if role == "decode":
        return batch / (scale * layer.seconds(batch, 0.0, batch * moments.context))
    # One sequence runs whatever the budget.
    batch = min(batch, max(1.0, settings.token_budget / (1 + moments.input / moments.output)))
    tokens = batch * (1 + moments.input / moments.output)
    squares = batch * moments.input_sq / moments.output
    return batch / (scale * layer.mean_seconds(batch, tokens, squares, batch * moments.context))
