"""How much of its data sheet a GPU reaches: calibrated profiles, and defaults by generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, ValidationError, model_validator

from hexgen2.specs.base import Spec
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GpuType

Fraction = Field(gt=0, le=1.5)
"""A share of the data sheet. Over 1 is allowed a little: some published peaks are at base clock."""


FRACTIONS = ("compute", "attention", "memory", "kv", "link")
OVERHEADS = (
    "layer_overhead_s",
    "step_overhead_s",
    "layer_launch_s",
    "prompt_overhead_s",
    "sequence_overhead_s",
    "request_overhead_s",
    "handoff_overhead_s",
    "handoff_byte_s",
    "handoff_wait_s",
    "handoff_wait_byte_s",
    "send_overhead_s",
    "send_byte_s",
)


class Efficiency(Spec):
    """Fractions of the data-sheet figures that an engine reaches on a GPU type, and fixed times in seconds.

    ``compute``: matrix products; ``attention``: prompt attention; both of the dense peak. ``memory``: reading
    weights; ``kv``: reading the KV cache; both of the memory bandwidth. ``link``: of a link inside the replica.
    ``layer_overhead_s`` per layer and iteration: norms, rotary embedding, cache writes, gaps between kernels.
    ``step_overhead_s`` per stage and iteration: scheduling, preparing inputs, sampling.

    The others are for engines that show them, and change nothing where they are left at their defaults:
    ``layer_launch_s`` per layer and iteration: the time that the host needs to launch a layer's kernels. The
    device works at the same time, so a stage takes the longer of the two (an engine without CUDA graphs decodes
    at the host's pace). ``prompt_overhead_s`` per stage for an iteration with prompts in it, beyond
    ``step_overhead_s``. ``sequence_overhead_s`` per sequence that yields a token, on the last stage: sampling,
    detokenising, keeping its books. ``request_overhead_s`` per request whose prompt begins, and
    ``handoff_overhead_s`` per request whose KV cache came from elsewhere, on the first stage: HTTP, entering
    and leaving the engine's books, asking for the cache. Both take time from the other requests of the engine,
    as they do where the server shares the model's processor; beside a GPU they hardly do. So do
    ``handoff_byte_s`` per byte of KV cache that a GPU of a decode group takes in, ``send_overhead_s`` per KV
    cache that a prefill group sends (on the first stage) and ``send_byte_s`` per byte that a GPU of it sends:
    with RDMA next to nothing, over TCP the copying, which the model's processor does on a CPU engine. What only
    the request itself waits for, beyond the link's time: ``handoff_wait_s`` and, per byte that a GPU takes in,
    ``handoff_wait_byte_s`` (notifications, polling, a processor that is shared while the cache comes).
    ``large_link``,
    ``large_message_bytes``: of an all-reduce's message, what goes beyond so many bytes is sent at that fraction
    of the link in place of ``link``. ``reduce_hops``: the latencies of a link that an all-reduce inside a node
    takes at most; a ring takes 2·(t−1), kernels that read all peers at once fewer.
    """

    compute: float = Fraction
    attention: float = Fraction
    memory: float = Fraction
    kv: float = Fraction
    link: float = Fraction
    layer_overhead_s: float = Field(ge=0)
    step_overhead_s: float = Field(ge=0)
    layer_launch_s: float = Field(default=0.0, ge=0)
    prompt_overhead_s: float = Field(default=0.0, ge=0)
    sequence_overhead_s: float = Field(default=0.0, ge=0)
    request_overhead_s: float = Field(default=0.0, ge=0)
    handoff_overhead_s: float = Field(default=0.0, ge=0)
    handoff_byte_s: float = Field(default=0.0, ge=0)
    handoff_wait_s: float = Field(default=0.0, ge=0)
    handoff_wait_byte_s: float = Field(default=0.0, ge=0)
    send_overhead_s: float = Field(default=0.0, ge=0)
    send_byte_s: float = Field(default=0.0, ge=0)
    large_link: float | None = Field(default=None, gt=0, le=1.5)
    large_message_bytes: float | None = Field(default=None, gt=0)
    reduce_hops: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _large_messages(self) -> Efficiency:
        if (self.large_link is None) != (self.large_message_bytes is None):
            raise ValueError("large_link and large_message_bytes go together; give both or neither")
        if self.large_link is not None and self.large_link > self.link:
            raise ValueError(f"large_link is {self.large_link}, above link; give at most {self.link}")
        return self

    def affine(self) -> Efficiency:
        """The same without what makes an iteration's time grow faster than in proportion: never slower."""
        return self.model_copy(update={"large_link": None, "large_message_bytes": None})


class FitRecord(Spec):
    """How well a GPU type's efficiencies are known: how many times were fitted, the median of the absolute
    relative errors by phase, and the 95% confidence interval of each parameter that was fitted."""

    measurements: int = Field(ge=1)
    median_error: dict[str, float]
    confidence: dict[str, tuple[float, float]]


class Profile(Spec):
    """Efficiencies fitted on measurements: of which engine, from where, when; ``fits`` by GPU type."""

    name: str
    source: str
    date: str
    engine: str
    gpus: dict[str, Efficiency]
    fits: dict[str, FitRecord] = Field(default_factory=dict)


# What a current vLLM (CUDA graphs, FlashAttention) reaches, rounded. Blackwell, Hopper, Ada and Ampere are from
# kernels measured under vLLM 0.24 (A100: 0.14) by which aiconfigurator-core 0.12 predicts, as fitted in the
# profile `aiconfigurator-0.12`; the others are judged from those (docs/cost-model.md).
_DEFAULTS: Mapping[str, Efficiency] = {
    name: Efficiency(
        compute=compute,
        attention=attention,
        memory=memory,
        kv=kv,
        link=link,
        layer_overhead_s=layer_us * 1e-6,
        step_overhead_s=step_ms * 1e-3,
    )
    for name, (compute, attention, memory, kv, link, layer_us, step_ms) in {
        "blackwell": (0.60, 0.70, 0.85, 0.80, 0.43, 40, 0.8),
        "hopper": (0.65, 0.65, 0.86, 0.83, 0.57, 43, 0.8),
        "ada": (0.60, 0.40, 0.77, 0.73, 0.50, 8, 1.0),
        "ampere": (0.75, 0.75, 0.73, 0.68, 0.34, 55, 1.0),
        "ampere-gddr": (0.60, 0.40, 0.75, 0.70, 0.50, 20, 1.0),
        "turing": (0.35, 0.15, 0.70, 0.50, 0.50, 60, 1.5),
        "volta": (0.50, 0.20, 0.70, 0.55, 0.40, 60, 1.5),
        "cdna3": (0.45, 0.35, 0.65, 0.55, 0.45, 50, 1.0),
        "cpu": (0.40, 0.10, 0.50, 0.20, 0.50, 150, 2.0),
    }.items()
}
_UNKNOWN = Efficiency(
    compute=0.45,
    attention=0.30,
    memory=0.65,
    kv=0.55,
    link=0.40,
    layer_overhead_s=50e-6,
    step_overhead_s=1.2e-3,
)
_SWITCHED_HOPS = 2.0
"""Latencies of an all-reduce where every GPU reaches every other by NVLink at once (fitted: 0.5 to 2.6)."""

_HBM_FROM = 1.2e12
"""Bytes/s above which an Ampere GPU is one with HBM ; the GA10x have GDDR6 and less power for their peak."""


def default_efficiency(gpu: GpuType) -> Efficiency:
    """The documented default of the type's generation (``cpu`` for any CPU); a cautious one if unknown."""
    if gpu.vendor == "cpu":
        return _DEFAULTS["cpu"]
    generation = gpu.generation.lower()
    if generation == "ampere" and gpu.memory_bandwidth < _HBM_FROM:
        generation = "ampere-gddr"
    found = _DEFAULTS.get(generation, _UNKNOWN)
    if gpu.link_kind in ("nvlink3", "nvlink4", "nvlink5"):
        return found.model_copy(update={"reduce_hops": _SWITCHED_HOPS})
    return found


class Efficiencies:
    """Which efficiency each GPU type has: that of the last profile that names it, else the default."""

    def __init__(self, profiles: Iterable[Profile] = ()) -> None:
        self._by_name: dict[str, Efficiency] = {}
        for profile in profiles:
            self._by_name.update(profile.gpus)

    def of(self, gpu: GpuType) -> Efficiency:
        """The efficiency of a type; of a mixed stage (named ``A+B`` by `weakest`) the worst of its members."""
        found = self._by_name.get(gpu.name)
        if found is not None:
            return found
        members = [self._by_name.get(name) for name in gpu.name.split("+")]
        return _worst([member or default_efficiency(gpu) for member in members])

    def is_default(self, gpu: GpuType) -> bool:
        """True when no profile names the type (of a mixed stage: not all of its members)."""
        return gpu.name not in self._by_name and not all(name in self._by_name for name in gpu.name.split("+"))


def parse_profile(document: Mapping[str, Any], source: str) -> Profile:
    """Check a profile document; raises InputError that names the field."""
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        raise InputError.from_validation(source, error) from None


def _worst(members: list[Efficiency]) -> Efficiency:
    if len(members) == 1:
        return members[0]
    worst: dict[str, float | None] = {
        name: min(getattr(member, name) for member in members) for name in FRACTIONS
    }
    worst |= {name: max(getattr(member, name) for member in members) for name in OVERHEADS}
    large = [
        (member.large_link, member.large_message_bytes)
        for member in members
        if member.large_link and member.large_message_bytes
    ]
    if large:
        fractions = [fraction for fraction, _ in large] + [member.link for member in members]
        worst["large_link"] = min(fractions)
        worst["large_message_bytes"] = min(size for _, size in large)
    hops = [member.reduce_hops for member in members]
    worst["reduce_hops"] = None if None in hops else max(hop for hop in hops if hop)
    return Efficiency(**worst)
