"""Engine profiles: which groups and routes a runtime can execute, as rules that have names.

A profile is data; its rules are predicates over layouts. Each returns the name of the rule that forbids a
group or a route, or None, so that a plan can say what kept a better layout out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Role

UNIFORM_TP = "uniform-tp"
DECODE_PP = "decode-pp"
PREFILL_PP = "prefill-pp"
TP_DIVIDES = "tp-divides"
EVEN_STAGES = "even-stages"
ONE_PHASE = "one-phase"

RULES: dict[str, str] = {
    UNIFORM_TP: "all stages of a group have one tensor-parallel size",
    DECODE_PP: "a decode group that receives KV caches has one pipeline stage",
    PREFILL_PP: "a prefill group has one pipeline stage",
    EVEN_STAGES: "a stage that spans nodes has as many GPUs on each",
    TP_DIVIDES: "the tensor-parallel sizes of both ends of a route divide each other",
    ONE_PHASE: "a group prefills or decodes, never both",
}
"""What each rule says, in words."""
_LIFTED: dict[str, dict[str, Any]] = {
    UNIFORM_TP: {"uniform_tp": False},
    DECODE_PP: {"decode_pp": True},
    PREFILL_PP: {"prefill_pp": True},
    EVEN_STAGES: {"even_stages": False},
    TP_DIVIDES: {"tp_divides": False},
    ONE_PHASE: {"colocated": True},
}
"""The field of a profile without the rule."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """What a runtime can execute.

    ``uniform_tp``: one TP for all stages of a group. ``decode_pp`` / ``prefill_pp``: whether groups of that
    role may have several stages (NIXL's pull connector wants one on both sides, its push connector only on the
    decode side). ``tp_divides``: on every route P_TP and D_TP divide each other.
    ``even_stages``: a stage over several nodes has as many GPUs on each. Colocated groups move no KV cache, so
    only ``uniform_tp`` and ``even_stages`` bind them. ``colocated``: whether there may be any (with every
    engine here; it is for comparisons without them).
    """

    name: str
    uniform_tp: bool = False
    decode_pp: bool = True
    prefill_pp: bool = True
    tp_divides: bool = False
    even_stages: bool = False
    colocated: bool = True

    def without(self, rule: str) -> EngineProfile:
        """The profile with a rule of `RULES` lifted."""
        return replace(self, **_LIFTED[rule])

    @property
    def rules(self) -> frozenset[str]:
        """The rules of `RULES` that are in force."""
        return frozenset(rule for rule in RULES if self.without(rule) != self)

    def group_rule(self, role: Role, tps: tuple[int, ...]) -> str | None:
        """The rule that forbids a group with these TP sizes, stage by stage; None when it can run."""
        if role == "colocated" and not self.colocated:
            return ONE_PHASE
        if self.uniform_tp and len(set(tps)) > 1:
            return UNIFORM_TP
        if len(tps) > 1:
            if role == "decode" and not self.decode_pp:
                return DECODE_PP
            if role == "prefill" and not self.prefill_pp:
                return PREFILL_PP
        return None

    def stage_rule(self, counts: Sequence[int]) -> str | None:
        """The rule that forbids a stage with these GPUs on its nodes, node by node; None when it can run."""
        return EVEN_STAGES if self.even_stages and len(set(counts)) > 1 else None

    def route_rule(self, source: tuple[int, ...], target: tuple[int, ...]) -> str | None:
        """The rule that forbids KV transfers between groups with these TP sizes; None when they can talk."""
        if self.tp_divides:
            for first in set(source):
                for second in set(target):
                    if max(first, second) % min(first, second):
                        return TP_DIVIDES
        return None


ANY = EngineProfile("any")
VLLM = EngineProfile(
    "vllm", uniform_tp=True, decode_pp=False, prefill_pp=True, tp_divides=True, even_stages=True
)
VLLM_ASYMMETRIC = EngineProfile("vllm-asymmetric", even_stages=True)

PROFILES: dict[str, EngineProfile] = {profile.name: profile for profile in (ANY, VLLM, VLLM_ASYMMETRIC)}


def engine_profile(name: str) -> EngineProfile:
    """The profile of that name; raises InputError for an unknown one."""
    try:
        return PROFILES[name]
    except KeyError:
        raise InputError(
            "--engine", "", f"there is no engine profile {name!r}", f"use one of {', '.join(PROFILES)}"
        ) from None
