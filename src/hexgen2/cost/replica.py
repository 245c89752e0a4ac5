"""The cost model's face: what one replica of a layout does, in seconds, bytes and requests per second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hexgen2.cost import capacity
from hexgen2.cost.capacity import ColocatedCapacity, DecodeCapacity, PrefillCapacity
from hexgen2.cost.layout import Layout
from hexgen2.cost.memory import Memory, Settings, memory
from hexgen2.cost.moments import Moments
from hexgen2.cost.profile import Efficiencies
from hexgen2.cost.stage import StageCost, stage_cost
from hexgen2.specs.model import Model
from hexgen2.specs.workload import Lengths


@dataclass(frozen=True)
class Compiled:
    """A layout reduced to coefficients: everything the formulas need."""

    costs: tuple[StageCost, ...]
    memory: Memory
    max_tokens: int


@dataclass(frozen=True, eq=False)
class CostModel:
    """DESIGN section 4 for one model. Results depend on the arguments alone; two caches only save time."""

    model: Model
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    settings: Settings = field(default_factory=Settings)
    _compiled: dict[Layout, Compiled] = field(default_factory=dict, init=False, repr=False)
    _moments: dict[int, tuple[Lengths, Moments]] = field(default_factory=dict, init=False, repr=False)

    def compiled(self, layout: Layout) -> Compiled:
        """The layout's coefficients; ValueError when its layers do not sum to the model's."""
        found = self._compiled.get(layout)
        if found is None:
            found = self._compiled[layout] = self._compile(layout)
        return found

    def weight_bytes(self, layout: Layout) -> tuple[float, ...]:
        """Bytes of weights on the fullest GPU of each stage."""
        return self.compiled(layout).memory.weights

    def free_kv_bytes(self, layout: Layout) -> tuple[float, ...]:
        """Bytes left for the KV cache on the fullest GPU of each stage; negative where weights do not fit."""
        return self.compiled(layout).memory.free

    def max_kv_tokens(self, layout: Layout) -> int:
        """Tokens of KV cache the replica holds: the minimum over its stages; 0 when the weights do not fit."""
        return self.compiled(layout).max_tokens

    def missing_bytes(self, layout: Layout, tokens: int = 1) -> float:
        """Memory lacking over all GPUs for the weights and a request of ``tokens`` tokens; 0 when it fits."""
        return self.compiled(layout).memory.missing(tokens)

    def prefill_seconds(self, layout: Layout, inputs: Sequence[int]) -> float:
        """Latency of one batch of prompts of these lengths through all stages."""
        return capacity.prefill_latency(*self._prefill(layout, inputs))

    def prefill_stage_seconds(self, layout: Layout, inputs: Sequence[int]) -> tuple[float, ...]:
        """How long one batch of prompts keeps each stage busy."""
        return tuple(self._prefill(layout, inputs)[1])

    def decode_step_seconds(self, layout: Layout, batch: int, context_tokens: float) -> float:
        """One token for each of ``batch`` sequences whose contexts sum to ``context_tokens``."""
        return capacity.decode_cycle(self.compiled(layout).costs, batch, context_tokens)

    def prefill_capacity(self, layout: Layout, lengths: Lengths | Moments) -> PrefillCapacity:
        """Requests per second as a prefill group."""
        of = self.compiled(layout)
        return capacity.prefill_capacity(of.costs, self.moments(lengths), of.max_tokens, self.settings)

    def decode_capacity(
        self, layout: Layout, lengths: Lengths | Moments, tpot_s: float | None = None
    ) -> DecodeCapacity:
        """Requests per second as a decode group, with ``tpot_s`` under a target for the time per token."""
        of = self.compiled(layout)
        return capacity.decode_capacity(of.costs, self.moments(lengths), of.max_tokens, self.settings, tpot_s)

    def colocated_capacity(
        self, layout: Layout, lengths: Lengths | Moments, tpot_s: float | None = None
    ) -> ColocatedCapacity:
        """Requests per second as a colocated group with chunked prefill."""
        of = self.compiled(layout)
        return capacity.colocated_capacity(
            of.costs, self.moments(lengths), of.max_tokens, self.settings, tpot_s
        )

    def moments(self, lengths: Lengths | Moments) -> Moments:
        """The moments of lengths, computed once per object."""
        if isinstance(lengths, Moments):
            return lengths
        found = self._moments.get(id(lengths))
        if found is None or found[0] is not lengths:
            # The lengths are kept beside the result, so that their id stays theirs (but for a copy in another
            # process, which has other ids).
            found = self._moments[id(lengths)] = (lengths, Moments.of(lengths))
        return found[1]

    def _prefill(self, layout: Layout, inputs: Sequence[int]) -> tuple[list[float], list[float]]:
        squares = float(sum(length * length for length in inputs))
        costs = self.compiled(layout).costs
        return capacity.prefill_times(costs, sum(inputs), squares, len(inputs), self.settings.token_budget)

    def _compile(self, layout: Layout) -> Compiled:
        layers = sum(stage.layers for stage in layout)
        if layers != self.model.layers:
            raise ValueError(f"the layout has {layers} layers, {self.model.name} has {self.model.layers}")
        costs: list[StageCost] = []
        first_layer = 0
        for place, stage in enumerate(layout):
            efficiency = self.efficiencies.of(stage.gpu)
            costs.append(stage_cost(self.model, stage, efficiency, first_layer, place == len(layout) - 1))
            first_layer += stage.layers
        sizes = memory(self.model, layout, self.settings)
        return Compiled(tuple(costs), sizes, sizes.max_tokens)
