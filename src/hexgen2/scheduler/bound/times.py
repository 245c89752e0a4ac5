"""The least time that a pipeline stage takes, for many batches at once, and the memory that it has at most.

A stage with l layers takes l·τ + s + (what its place in the pipeline costs), where τ is the least time of any
sort of layer that the model has. Costs come from `cost.stage`; here they are evaluated on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hexgen2.cost.capacity import resident_tokens
from hexgen2.cost.layout import StageShape
from hexgen2.cost.memory import kv_bytes_per_token, overhead_bytes, stage_weight_bytes, workspace_bytes
from hexgen2.cost.moments import Moments
from hexgen2.cost.replica import CostModel
from hexgen2.cost.stage import StageCost, stage_cost
from hexgen2.specs.gpu import GpuType, Link
from hexgen2.specs.model import Model

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Iteration:
    """What an iteration of one micro-batch carries (see `StageCost.seconds`), all of one shape; ``weight``: how
    many such iterations there are."""

    weight: FloatArray | float
    tokens: FloatArray
    squares: FloatArray
    context: FloatArray
    yields: FloatArray


def many_seconds(cost: StageCost, work: Iteration) -> FloatArray:
    """`StageCost.seconds` for arrays of iterations, times their weights."""
    attention = work.squares * cost.attention_s
    busy = cost.fixed_s + work.tokens * cost.token_s
    busy = busy + np.maximum(work.tokens - cost.small_tokens, 0.0) * cost.large_token_s
    if cost.dense_layers:
        computed = work.tokens * cost.dense_token_s + attention
        busy = busy + cost.dense_layers * np.maximum(computed, cost.dense_read_s)
    if cost.moe_layers:
        touched = -cost.experts * np.expm1(work.tokens * cost.expert_miss_log)
        read = cost.moe_read_s + cost.expert_read_s * touched
        busy = busy + cost.moe_layers * np.maximum(work.tokens * cost.moe_token_s + attention, read)
    total = np.maximum(busy, cost.launch_s) + work.context * cost.context_s + cost.step_s
    if cost.prompt_s:
        total = total + np.where(work.squares > 0, cost.prompt_s, 0.0)
    if cost.head_read_s:
        head = np.maximum(work.yields * cost.head_token_s, cost.head_read_s) + work.yields * cost.gather_s
        total = total + np.where(work.yields > 0, head, 0.0)
    seconds: FloatArray = total * work.weight
    return seconds


class StageTimes:
    """Times of stages of ``tp`` GPUs of one type, joined by ``link``, in the middle of a pipeline."""

    def __init__(self, cost: CostModel, gpu: GpuType, tp: int, link: Link | None) -> None:
        self._cost, self._gpu, self._tp, self._link = cost, gpu, tp, link if tp > 1 else None
        # Slower large all-reduces would make larger batches slower per sequence. Without them, and without what
        # an iteration pays for having prompts at all, no time is longer.
        self._efficiency = cost.efficiencies.of(gpu).affine().model_copy(update={"prompt_overhead_s": 0.0})
        self._boundaries: dict[Link, tuple[float, float]] = {}
        self._bare = self._compiled(cost.model, 0)
        self._layers = [self._compiled(sort, sort.layers) for sort in layer_sorts(cost.model)]
        self._last = self._compiled(cost.model, cost.model.layers, last=True)

    def fixed(self, work: Sequence[Iteration]) -> FloatArray:
        """Seconds of a stage apart from its layers."""
        return _sum(self._bare, work)

    def layer(self, work: Sequence[Iteration]) -> FloatArray:
        """Seconds of one more layer: the least of all sorts of layer."""
        least: FloatArray = np.minimum.reduce([self._each(cost, work) for cost in self._layers])
        return least

    def layer_of_any_batch(self, work: Sequence[Iteration], decoding: Iteration) -> FloatArray:
        """The same where fewer sequences may share an iteration's work, so that fewer iterations carry prompts;
        ``decoding``: an iteration without.

        What is computed takes no less time then. The reading of experts may, since many prompt tokens touch all
        at once: it counts as in decoding alone.
        """
        least: FloatArray = np.minimum.reduce(
            [
                np.maximum(self._each(replace(cost, expert_read_s=0.0), work), self._each(cost, [decoding]))
                for cost in self._layers
            ]
        )
        return least

    def _each(self, cost: StageCost, work: Sequence[Iteration]) -> FloatArray:
        each: FloatArray = (_sum(cost, work) - self.fixed(work)) / self._cost.model.layers
        return each

    def boundary(self, link: Link) -> tuple[float, float]:
        """(seconds per iteration, seconds per token) of receiving hidden states over a link.

        They may hide behind the time in which the host launches the layers' kernels.
        """
        known = self._boundaries.get(link)
        if known is None:
            entered = self._compiled(self._cost.model, 0, upstream=link)
            known = entered.fixed_s - self._bare.fixed_s, entered.token_s - self._bare.token_s
            if self._efficiency.layer_launch_s > 0:
                known = 0.0, 0.0
            self._boundaries[link] = known
        return known

    def head(self, work: Sequence[Iteration]) -> FloatArray:
        """Seconds of the LM head, more than a stage without it takes."""
        more: FloatArray = _sum(self._last, work) - _sum(self._layers[0], work)
        return np.maximum(more, 0.0)

    def _compiled(
        self, model: Model, layers: int, *, last: bool = False, upstream: Link | None = None
    ) -> StageCost:
        stage = StageShape(self._gpu, self._tp, layers, self._link, upstream)
        # Layers beyond the model's last are of the sort that comes last; none of them is the first.
        return stage_cost(model, stage, self._efficiency, model.layers, last=last)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the fullest GPU of a stage: free for layers at most, per layer at least, per layer and token."""

    free: float
    per_layer: float
    per_token: float

    def layers(self, tokens: FloatArray) -> FloatArray:
        """The most layers that fit with their KV cache for so many tokens (whole, at least 0)."""
        most: FloatArray = np.floor(self.free / (self.per_layer + tokens * self.per_token) + 1e-9)
        return np.maximum(0.0, most)


def stage_memory(cost: CostModel, gpu: GpuType, tp: int, *, first: bool, last: bool) -> StageMemory:
    """Memory of a stage of a pipeline."""
    model, settings = cost.model, cost.settings
    empty, single = StageShape(gpu, tp, 0), StageShape(gpu, tp, 1)
    ends = stage_weight_bytes(model, empty, 0, first=first, last=last)
    per_layer = min(
        stage_weight_bytes(sort, single, sort.layers, first=False, last=False) for sort in layer_sorts(model)
    )
    used = ends + workspace_bytes(model, single, settings, last=last) + overhead_bytes(single, 2, settings)
    free = settings.memory_utilisation * gpu.memory_bytes - used
    return StageMemory(free, per_layer, kv_bytes_per_token(model, single))


def pipeline_memory(cost: CostModel, gpu: GpuType, widest: int) -> float:
    """The most bytes of one GPU that layers and KV caches may have in a stage of a pipeline; ``widest``: the
    largest TP size, whose workspace is the smallest."""
    stage = StageShape(gpu, widest, 1)
    used = overhead_bytes(stage, 2, cost.settings) + workspace_bytes(
        cost.model, stage, cost.settings, last=False
    )
    return cost.settings.memory_utilisation * gpu.memory_bytes - used


def held_bytes(cost: CostModel, moments: Moments) -> float:
    """kv + W / max_batch: the memory that each of at most max_batch sequences asks of a pipeline, for its KV
    cache and its part of the layers' weights."""
    model, settings = cost.model, cost.settings
    weights = model.layers_params * model.weight_bytes
    return resident_tokens(moments, settings) * model.kv_bytes_per_token + weights / settings.max_batch


def layer_sorts(model: Model) -> tuple[Model, ...]:
    """The model as if all its layers were alike, once for each sort of layer that it has."""
    if model.moe is None or not model.moe.dense_layers:
        return (model,)
    dense = model.moe.model_copy(update={"dense_layers": 2 * model.layers})
    return model, model.model_copy(update={"moe": dense})


def _sum(cost: StageCost, work: Sequence[Iteration]) -> FloatArray:
    total: FloatArray = np.add.reduce([many_seconds(cost, iteration) for iteration in work])
    return total
