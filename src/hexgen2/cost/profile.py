"""How much of its data sheet a GPU reaches: calibrated profiles, and defaults by generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, ValidationError

from hexgen2.specs.base import Spec
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GpuType

Fraction = Field(gt=0, le=1.5)
"""A share of the data sheet. Over 1 is allowed a little: some published peaks are at base clock."""


class Efficiency(Spec):
    """Fractions of the data-sheet figures that an engine reaches on a GPU type, and fixed times in seconds.

    ``compute``: matrix products; ``attention``: prompt attention; both of the dense peak. ``memory``: reading
    weights; ``kv``: reading the KV cache; both of the memory bandwidth. ``link``: of a link inside the replica.
    ``layer_overhead_s`` per layer and iteration: norms, rotary embedding, cache writes, gaps between kernels.
    ``step_overhead_s`` per stage and iteration: scheduling, preparing inputs, sampling.
    """

    compute: float = Fraction
    attention: float = Fraction
    memory: float = Fraction
    kv: float = Fraction
    link: float = Fraction
    layer_overhead_s: float = Field(ge=0)
    step_overhead_s: float = Field(ge=0)


class Profile(Spec):
    """Efficiencies fitted on measurements: of which engine, from where, when."""

    name: str
    source: str
    date: str
    engine: str
    gpus: dict[str, Efficiency]


# What a current vLLM (0.1x and later: CUDA graphs, FlashAttention) reaches, rounded; docs/cost-model.md has the
# reason for each figure. Profiles take their place where there are measurements.
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
        "blackwell": (0.55, 0.45, 0.75, 0.65, 0.70, 6, 0.8),
        "hopper": (0.58, 0.50, 0.80, 0.70, 0.70, 6, 0.8),
        "ada": (0.55, 0.50, 0.80, 0.70, 0.70, 8, 1.0),
        "ampere": (0.60, 0.50, 0.80, 0.70, 0.70, 8, 1.0),
        "turing": (0.35, 0.15, 0.75, 0.50, 0.65, 15, 1.5),
        "volta": (0.50, 0.20, 0.75, 0.55, 0.65, 12, 1.5),
        "cdna3": (0.45, 0.35, 0.65, 0.55, 0.60, 10, 1.0),
        "cpu": (0.40, 0.10, 0.50, 0.20, 0.50, 150, 2.0),
    }.items()
}
_UNKNOWN = Efficiency(
    compute=0.45,
    attention=0.30,
    memory=0.70,
    kv=0.55,
    link=0.60,
    layer_overhead_s=10e-6,
    step_overhead_s=1.2e-3,
)


def default_efficiency(gpu: GpuType) -> Efficiency:
    """The documented default of the type's generation (``cpu`` for any CPU); a cautious one if unknown."""
    if gpu.vendor == "cpu":
        return _DEFAULTS["cpu"]
    return _DEFAULTS.get(gpu.generation.lower(), _UNKNOWN)


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
    fractions = {
        field: min(getattr(member, field) for member in members)
        for field in ("compute", "attention", "memory", "kv", "link")
    }
    return Efficiency(
        **fractions,
        layer_overhead_s=max(member.layer_overhead_s for member in members),
        step_overhead_s=max(member.step_overhead_s for member in members),
    )
