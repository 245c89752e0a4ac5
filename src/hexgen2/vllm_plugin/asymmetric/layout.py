"""The layout of a group as the runtime executes it: stages, each with its own TP, layers, node and devices.

A layout also numbers the group's ranks and says who feeds whom. Ranks are numbered node by node, so that each
node's ranks are consecutive and the leader's start at 0, whatever order the stages visit the nodes in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import Field, ValidationError, model_validator

from hexgen2.specs.base import Spec
from hexgen2.specs.errors import InputError

LAYOUT_KEY = "hexgen2_layout"
"""Where the layout stands in vLLM's `additional_config`, as a JSON document."""

_SHORT_STAGE = re.compile(r"(\d+)x(\d+)(?:@(\d+))?")


class StageLayout(Spec):
    """A pipeline stage: `tp` devices of one node hold `layers` layers from `first_layer` on.

    `devices` are the node's device indices in TP order, among those that its process sees; empty for the node's
    devices in rank order.
    """

    tp: int = Field(ge=1)
    first_layer: int = Field(ge=0)
    layers: int = Field(ge=1)
    node: int = Field(default=0, ge=0)
    devices: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _one_device_per_rank(self) -> StageLayout:
        if self.devices and len(self.devices) != self.tp:
            raise ValueError(f"tp is {self.tp} but there are {len(self.devices)} devices; make them equal")
        return self


@dataclass(frozen=True)
class Place:
    """Where one rank stands: its global rank, its node and the rank there, its stage and the TP rank there."""

    rank: int
    node: int
    local_rank: int
    stage: int
    tp_rank: int


class Layout(Spec):
    """The ordered stages of one group. Node 0 leads: it runs the API server and the scheduler.

    >>> layout = Layout.parse("2x3+1x1", "--layout")
    >>> [stage.tp for stage in layout.stages], layout.world_size, layout.partition
    ([2, 1], 3, '3,1')
    """

    stages: tuple[StageLayout, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Layout:
        next_layer = 0
        for index, stage in enumerate(self.stages):
            if stage.first_layer != next_layer:
                raise ValueError(
                    f"stage {index} starts at layer {stage.first_layer}, not at {next_layer}; "
                    "let stages follow each other"
                )
            next_layer += stage.layers
        nodes = {stage.node for stage in self.stages}
        if nodes != set(range(len(nodes))):
            raise ValueError(f"the nodes are {sorted(nodes)}; number them from 0 without gaps")
        for node in sorted(nodes):
            here = [stage for stage in self.stages if stage.node == node]
            devices = [device for stage in here for device in stage.devices]
            if devices and not all(stage.devices for stage in here):
                raise ValueError(
                    f"some stages of node {node} name no devices; name them for all of its stages or none"
                )
            if len(set(devices)) < len(devices):
                raise ValueError(f"node {node} uses a device twice; give each rank its own")
        return self

    @classmethod
    def parse(cls, text: str, source: str) -> Layout:
        """Read a layout from JSON (`{"stages": [...]}`) or from the short form `TPxLAYERS[@NODE]+...`.

        Raises InputError for anything else.
        """
        if text.lstrip().startswith("{"):
            try:
                return cls.model_validate_json(text)
            except ValidationError as error:
                raise InputError.from_validation(source, error) from None
        stages: list[dict[str, int]] = []
        first = 0
        for part in text.split("+"):
            match = _SHORT_STAGE.fullmatch(part.strip())
            if match is None:
                raise InputError(
                    source,
                    "",
                    f"{part!r} is not a stage",
                    "write TPxLAYERS[@NODE] stages joined by +, as in 2x5+1x3",
                )
            tp, layers, node = int(match[1]), int(match[2]), int(match[3] or 0)
            stages.append({"tp": tp, "first_layer": first, "layers": layers, "node": node})
            first += layers
        return cls.read({"stages": stages}, source)

    @classmethod
    def read(cls, document: Mapping[str, Any], source: str) -> Layout:
        """Check a layout document; raises InputError."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise InputError.from_validation(source, error) from None

    def document(self) -> dict[str, Any]:
        """The layout as JSON values, for `additional_config`."""
        return self.model_dump(mode="json")

    @property
    def layers(self) -> int:
        """Layers of the whole model."""
        return sum(stage.layers for stage in self.stages)

    @property
    def world_size(self) -> int:
        return sum(stage.tp for stage in self.stages)

    @property
    def nodes(self) -> int:
        return 1 + max(stage.node for stage in self.stages)

    @property
    def uniform_tp(self) -> int | None:
        """The TP of all stages where it is one; None for an asymmetric layout."""
        sizes = {stage.tp for stage in self.stages}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def partition(self) -> str:
        """The layers of the stages as `VLLM_PP_LAYER_PARTITION` wants them."""
        return ",".join(str(stage.layers) for stage in self.stages)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Every rank's place, in rank order."""
        order = sorted(
            (stage.node, index, tp_rank)
            for index, stage in enumerate(self.stages)
            for tp_rank in range(stage.tp)
        )
        places: list[Place] = []
        for rank, (node, index, tp_rank) in enumerate(order):
            local_rank = sum(place.node == node for place in places)
            places.append(Place(rank, node, local_rank, index, tp_rank))
        return tuple(places)

    @cached_property
    def stage_ranks(self) -> tuple[tuple[int, ...], ...]:
        """Per stage, its global ranks in TP order."""
        return tuple(
            tuple(place.rank for place in self.places if place.stage == index)
            for index in range(len(self.stages))
        )

    def node_ranks(self, node: int) -> range:
        """The global ranks of a node: consecutive, by the numbering."""
        ranks = [place.rank for place in self.places if place.node == node]
        return range(ranks[0], ranks[-1] + 1)

    def node_devices(self, node: int) -> tuple[int, ...]:
        """The node's devices in the order of its ranks; empty where the layout names none."""
        devices = []
        for place in self.places:
            stage = self.stages[place.stage]
            if place.node == node and stage.devices:
                devices.append(stage.devices[place.tp_rank])
        return tuple(devices)

    @property
    def output_rank(self) -> int:
        """The rank whose outputs the scheduler reads: the first of the last stage."""
        return self.stage_ranks[-1][0]

    def virtual_rank(self, rank: int) -> int:
        """A rank from which vLLM's uniform arithmetic, `rank // tp % pp`, derives the right stage."""
        place = self.places[rank]
        return place.stage * self.stages[place.stage].tp + place.tp_rank

    def chain(self, rank: int) -> tuple[int, ...]:
        """One rank per stage as `rank` sees the pipeline: itself in its own, its counterparts in the others.

        With equal TPs these are the ranks of vLLM's own pipeline group.

        >>> Layout.parse("2x4+1x4", "--layout").chain(1)
        (1, 2)
        """
        place = self.places[rank]
        return tuple(
            rank if index == place.stage else ranks[place.tp_rank % len(ranks)]
            for index, ranks in enumerate(self.stage_ranks)
        )

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """All ranks, divided so that each part holds exactly one rank of the last stage.

        That rank is the end of the chains of the others. What the last stage broadcasts (sampled tokens)
        travels inside these parts, and so reaches each rank once.

        >>> Layout.parse("1x4+2x4", "--layout").columns
        ((0, 1), (2,))
        """
        parts: dict[int, list[int]] = {rank: [] for rank in self.stage_ranks[-1]}
        for place in self.places:
            parts[self.chain(place.rank)[-1]].append(place.rank)
        return tuple(tuple(part) for part in parts.values())

    def feeder(self, rank: int) -> int:
        """The rank of the previous stage that sends hidden states to `rank`; ValueError in the first stage."""
        place = self.places[rank]
        if place.stage == 0:
            raise ValueError(f"rank {rank} is in the first stage")
        return self.chain(rank)[place.stage - 1]

    def fed(self, rank: int) -> tuple[int, ...]:
        """The ranks of the next stage to which `rank` sends hidden states; none in the last stage.

        Hidden states are whole on every rank of a stage, so any of them may send.

        >>> Layout.parse("2x4+4x4", "--layout").fed(1)
        (3, 5)
        """
        stage = self.places[rank].stage + 1
        if stage == len(self.stages):
            return ()
        return tuple(receiver for receiver in self.stage_ranks[stage] if self.feeder(receiver) == rank)
