"""Layouts valued stage by stage: the cost model's coefficients of a stage, each computed once.

Equal stages occur in very many layouts of a search. The figures are those of `CostModel` to the last bit (the
tests compare them); only the way to them is shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen2.cost import capacity, goodput, queues
from hexgen2.cost.capacity import ColocatedCapacity, DecodeCapacity, PrefillCapacity
from hexgen2.cost.goodput import Targets
from hexgen2.cost.layout import StageShape
from hexgen2.cost.memory import kv_bytes_per_token, overhead_bytes, stage_weight_bytes, workspace_bytes
from hexgen2.cost.moments import Moments
from hexgen2.cost.queues import PromptQueue
from hexgen2.cost.replica import CostModel
from hexgen2.cost.stage import StageCost, stage_cost
from hexgen2.scheduler.topology import Members, Topology
from hexgen2.specs.gpu import GpuType, Link, weakest

NO_LINK = -1


@dataclass(frozen=True, slots=True)
class StageKind:
    """The GPUs of a stage apart from layers and neighbours; ``number`` tells kinds apart."""

    number: int
    gpu: GpuType
    tp: int
    link: Link | None
    compute: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of the fullest GPU of a stage kind: bytes free before any layer, then bytes of weights per layer
    and of KV cache per layer and token."""

    free: float
    per_layer: float
    per_token: float

    def layers(self, tokens: float) -> int:
        """Layers that fit together with their KV cache for that many tokens."""
        return int(self.free // (self.per_layer + tokens * self.per_token))


@dataclass(frozen=True, slots=True)
class Valued:
    """A layout's coefficients: stage costs, and the KV tokens it holds."""

    costs: tuple[StageCost, ...]
    max_tokens: int


class StageValues:
    """Coefficients of stages of one cost model on one topology."""

    def __init__(self, topology: Topology, cost: CostModel, moments: Moments) -> None:
        self.topology = topology
        self.cost = cost
        self.moments = moments
        self._kinds: dict[tuple[object, ...], StageKind] = {}
        self._stages: dict[tuple[int, int, int, int, bool, bool], tuple[StageCost, int]] = {}
        self._rooms: dict[tuple[int, bool, bool, bool], Room] = {}

    def kind(self, members: Members) -> StageKind:
        """What a stage of these GPUs is."""
        topology = self.topology
        if len(members) == 1:
            node, tp = members[0]
            key: tuple[object, ...] = (int(topology.node_class[node]), tp)
        else:
            key = members
        known = self._kinds.get(key)
        if known is None:
            known = self._kinds[key] = self._kind(members)
        return known

    def room(self, kind: StageKind, *, first: bool, last: bool, alone: bool) -> Room:
        """How many layers a stage could hold, as bytes (``alone``: the group has one GPU)."""
        key = (kind.number, first, last, alone)
        known = self._rooms.get(key)
        if known is None:
            model, middle = self.cost.model, self.cost.model.layers // 2
            one, two = (
                stage_weight_bytes(model, StageShape(kind.gpu, kind.tp, layers), middle, first=first, last=last)
                for layers in (1, 2)
            )
            free = self._free(kind, 1, middle, first=first, last=last, alone=alone)
            per_token = kv_bytes_per_token(model, StageShape(kind.gpu, kind.tp, 1))
            known = self._rooms[key] = Room(free + two - one, two - one, per_token)
        return known

    def value(self, chain: Sequence[StageKind], layers: Sequence[int], upstream: Sequence[int]) -> Valued:
        """A layout: stage kinds, layers, and the class of the link by which each is reached (NO_LINK first)."""
        final = len(chain) - 1
        alone = final == 0 and chain[0].tp == 1
        first_layer = 0
        costs: list[StageCost] = []
        tokens = 1 << 62
        for place, (kind, count) in enumerate(zip(chain, layers, strict=True)):
            # Where a stage begins matters only for being the first, unless some layers are unlike others.
            begins = first_layer if self.cost.model.moe is not None else min(first_layer, 1)
            key = (kind.number, count, upstream[place], begins, place == final, alone)
            known = self._stages.get(key)
            if known is None:
                known = self._stages[key] = self._stage(
                    kind, count, upstream[place], begins, last=place == final, alone=alone
                )
            costs.append(known[0])
            tokens = min(tokens, known[1])
            first_layer += count
        return Valued(tuple(costs), max(0, tokens))

    def prefill(self, valued: Valued) -> PrefillCapacity:
        """Capacity as a prefill group."""
        return capacity.prefill_capacity(valued.costs, self.moments, valued.max_tokens, self.cost.settings)

    def decode(self, valued: Valued, tpot_s: float | None) -> DecodeCapacity:
        """Capacity as a decode group."""
        return capacity.decode_capacity(
            valued.costs, self.moments, valued.max_tokens, self.cost.settings, tpot_s
        )

    def colocated(self, valued: Valued, tpot_s: float | None) -> ColocatedCapacity:
        """Capacity as a colocated group."""
        return capacity.colocated_capacity(
            valued.costs, self.moments, valued.max_tokens, self.cost.settings, tpot_s
        )

    def prompt_queue(self, valued: Valued, found: PrefillCapacity) -> PromptQueue:
        """What prompts wait for in a prefill group."""
        return queues.prompt_queue(valued.costs, self.moments, found.batch_requests, self.cost.settings)

    def decode_goodput(self, valued: Valued, found: DecodeCapacity, above: float) -> float:
        """Requests/s of a decode group within the TPOT target of ``found``, waiting counted."""
        return goodput.decode_goodput(found, valued.costs, self.moments, above)

    def colocated_goodput(
        self, valued: Valued, found: ColocatedCapacity, targets: Targets, above: float
    ) -> float:
        """Requests/s of a colocated group within both targets."""
        return goodput.colocated_goodput(found, valued.costs, self.moments, self.cost.settings, targets, above)

    def _kind(self, members: Members) -> StageKind:
        topology = self.topology
        nodes = [node for node, _ in members]
        tp = sum(count for _, count in members)
        inside = [(node, node) for node, count in members if count > 1]
        inside += [(a, b) for place, a in enumerate(nodes) for b in nodes[:place]]
        gpu = weakest([topology.types[node] for node in nodes])
        efficiency = self.cost.efficiencies.of(gpu)
        return StageKind(
            number=len(self._kinds),
            gpu=gpu,
            tp=tp,
            link=topology.slowest(inside),
            compute=tp * gpu.flops * efficiency.compute,
            bandwidth=tp * gpu.memory_bandwidth * efficiency.memory,
        )

    def _stage(
        self, kind: StageKind, layers: int, upstream: int, first_layer: int, *, last: bool, alone: bool
    ) -> tuple[StageCost, int]:
        cost = self.cost
        link = None if upstream == NO_LINK else self.topology.link_of_class(upstream)
        stage = StageShape(kind.gpu, kind.tp, layers, kind.link, link)
        free = self._free(kind, layers, first_layer, first=first_layer == 0, last=last, alone=alone)
        block = cost.settings.block_size
        tokens = int(free // (kv_bytes_per_token(cost.model, stage) * block)) * block
        return stage_cost(cost.model, stage, cost.efficiencies.of(kind.gpu), first_layer, last), tokens

    def _free(
        self, kind: StageKind, layers: int, first_layer: int, *, first: bool, last: bool, alone: bool
    ) -> float:
        model, settings = self.cost.model, self.cost.settings
        stage = StageShape(kind.gpu, kind.tp, layers)
        used = stage_weight_bytes(model, stage, first_layer, first=first, last=last)
        used += workspace_bytes(model, stage, settings, last=last)
        used += overhead_bytes(stage, 1 if alone else 2, settings)
        return settings.memory_utilisation * kind.gpu.memory_bytes - used
