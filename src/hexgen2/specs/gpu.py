"""What a GPU type can do: the figures that the cost model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from hexgen2.specs.base import Spec

GIB = float(2**30)


class Link(Spec):
    """A connection between two devices; ``bandwidth`` in bytes/s per direction, ``latency`` in seconds."""

    bandwidth: float = Field(gt=0)
    latency: float = Field(ge=0)

    def seconds(self, size_bytes: float) -> float:
        """Time to send ``size_bytes`` in one message: latency + size / bandwidth."""
        return self.latency + size_bytes / self.bandwidth


class GpuType(Spec):
    """One type of accelerator. SI units; the catalog's YAML has human units and a source for each figure.

    ``flops`` is the dense peak (no sparsity) in ``dense_dtype``; ``link`` is what joins two GPUs of this type
    inside one node, per direction, as the data sheet has it.
    """

    name: str
    vendor: Literal["nvidia", "amd", "cpu"]
    generation: str
    memory_bytes: float = Field(gt=0)
    flops: float = Field(gt=0)
    dense_dtype: Literal["bf16", "fp16", "fp32"]
    memory_bandwidth: float = Field(gt=0)
    link_kind: str
    link: Link


def weakest(types: Sequence[GpuType]) -> GpuType:
    """The type that a tensor-parallel stage of these GPUs runs at: the minimum of every figure.

    A stage of unlike GPUs waits for its slowest member at every all-reduce and can hold no more than its
    smallest one (DESIGN section 4). For one type it is that type itself.
    """
    distinct = sorted({gpu.name: gpu for gpu in types}.values(), key=lambda gpu: gpu.name)
    if len(distinct) == 1:
        return distinct[0]
    slowest = min(distinct, key=lambda gpu: gpu.flops)
    return slowest.model_copy(
        update={
            "name": "+".join(gpu.name for gpu in distinct),
            "memory_bytes": min(gpu.memory_bytes for gpu in distinct),
            "memory_bandwidth": min(gpu.memory_bandwidth for gpu in distinct),
            "link": Link(
                bandwidth=min(gpu.link.bandwidth for gpu in distinct),
                latency=max(gpu.link.latency for gpu in distinct),
            ),
        }
    )
