"""Engine profiles: what each rule forbids."""

from __future__ import annotations

import pytest

from hexgen2.scheduler.engines import (
    DECODE_PP,
    EVEN_STAGES,
    ONE_PHASE,
    PREFILL_PP,
    PROFILES,
    RULES,
    TP_DIVIDES,
    UNIFORM_TP,
    EngineProfile,
)
from hexgen2.scheduler.engines import engine_profile as find
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Role


@pytest.mark.parametrize(
    ("profile", "role", "tps", "rule"),
    [
        ("vllm", "prefill", (2, 2), None),
        ("vllm", "prefill", (2, 1), UNIFORM_TP),
        ("vllm", "decode", (2, 2), DECODE_PP),
        ("vllm", "decode", (4,), None),
        ("vllm", "colocated", (2, 2), None),
        ("vllm", "colocated", (4, 2), UNIFORM_TP),
        ("vllm-asymmetric", "decode", (4, 2, 1), None),
        ("any", "decode", (4, 2, 1), None),
    ],
)
def test_group_rules(profile: str, role: Role, tps: tuple[int, ...], rule: str | None) -> None:
    assert PROFILES[profile].group_rule(role, tps) == rule


def test_pull_connector_forbids_prefill_pipelines() -> None:
    pull = EngineProfile("pull", uniform_tp=True, prefill_pp=False, decode_pp=False)
    assert pull.group_rule("prefill", (1, 1)) == PREFILL_PP
    assert pull.group_rule("prefill", (4,)) is None


def test_groups_of_one_phase() -> None:
    """For comparisons without colocated groups."""
    apart = EngineProfile("apart", colocated=False)
    assert apart.group_rule("colocated", (4,)) == ONE_PHASE
    assert apart.group_rule("prefill", (4,)) is None
    assert apart.without(ONE_PHASE).group_rule("colocated", (4,)) is None
    assert ONE_PHASE not in PROFILES["any"].rules


@pytest.mark.parametrize(
    ("profile", "source", "target", "rule"),
    [
        ("vllm", (2, 2), (4,), None),
        ("vllm", (4,), (2,), None),
        ("vllm", (7,), (2,), TP_DIVIDES),
        ("any", (7,), (2,), None),
    ],
)
def test_route_rules(profile: str, source: tuple[int, ...], target: tuple[int, ...], rule: str | None) -> None:
    assert PROFILES[profile].route_rule(source, target) == rule


@pytest.mark.parametrize(
    ("counts", "rule"), [((4,), None), ((2, 2), None), ((3, 1), EVEN_STAGES), ((1, 1, 2), EVEN_STAGES)]
)
def test_stage_rules(counts: tuple[int, ...], rule: str | None) -> None:
    assert PROFILES["vllm"].stage_rule(counts) == PROFILES["vllm-asymmetric"].stage_rule(counts) == rule
    assert PROFILES["any"].stage_rule(counts) is None


def test_every_rule_is_explained() -> None:
    assert set(RULES) == {UNIFORM_TP, DECODE_PP, PREFILL_PP, TP_DIVIDES, EVEN_STAGES, ONE_PHASE}


def test_an_unknown_profile_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match="no engine profile 'tgi'; use one of any, vllm"):
        find("tgi")
