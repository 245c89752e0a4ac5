"""A plan names the engine rule that kept a better layout out, and no rule where none did."""

from __future__ import annotations

from hexgen2.scheduler.engines import DECODE_PP, RULES
from hexgen2.scheduler.evaluate import Evaluator, paper_rule
from hexgen2.scheduler.plan_build import rejections
from hexgen2.scheduler.solution import Cell, assess
from hexgen2.specs.plan import Rejection
from tests.scheduler.support import A100, L40, LARGE, cluster, problem


def found(engine: str) -> tuple[Rejection, ...]:
    """Rejections of a decode group on two nodes: as one stage over both, or better as a pipeline."""
    evaluator = Evaluator(problem(cluster((A100, 4), (L40, 2), (L40, 2), gbps=10), LARGE, engine), paper_rule)
    cells = (Cell(((0, 4),), "prefill"), Cell(((1, 2), (2, 2)), "decode"))
    solution = assess(evaluator, cells)
    assert solution is not None
    assert solution.value > 0
    return rejections(evaluator, solution, [0, 1], {0: "p0", 1: "d0"})


def test_a_forbidden_better_layout_is_named_with_its_rule_and_gain() -> None:
    (rejection,) = [entry for entry in found("vllm") if "d0" in entry.detail]
    assert rejection.rule == DECODE_PP
    assert rejection.detail.startswith(RULES[DECODE_PP])
    assert rejection.gain is not None
    assert rejection.gain > 0.01


def test_the_unrestricted_profile_rejects_nothing() -> None:
    assert found("any") == ()
