"""Plans of tiny clusters that anyone can reason about: which node does what, and what limits it.

One replica of the model fits on any GPU here, so a group is one GPU: "p n0" prefills on node n0.
"""

from __future__ import annotations

import pytest

from hexgen2.scheduler import schedule
from tests.scheduler.support import A100, A6000, H100, L40, cluster, lengths, problem

CASES = [
    # Two unlike GPUs, long prompts: apart they are idle in turn, together each does both phases.
    ([(H100, 1), (A100, 1)], 100, (1500, 100), "hexgen2", ["c n0", "c n1"], {"c0", "c1"}),
    # The paper's answer puts the faster one to prefill, and prefill is the limit.
    ([(H100, 1), (A100, 1)], 100, (1500, 100), "paper", ["d n1", "p n0"], {"p0"}),
    # The paper balances two and two: compute prefills, the A6000s decode and are the limit.
    ([(H100, 2), (A6000, 2)], 100, (2000, 200), "paper", ["d n1", "d n1", "p n0", "p n0"], {"d0", "d1"}),
    # Alike GPUs gain nothing from parting.
    ([(A100, 2)], 100, (300, 300), "hexgen2", ["c n0", "c n0"], {"c0", "c1"}),
    # 1 Gb/s carries no KV caches: the paper's plan hangs on the link, ours stays off it.
    ([(A6000, 1), (L40, 1)], 1, (300, 300), "paper", ["d n1", "p n0"], {"link n0→n1"}),
    ([(A6000, 1), (L40, 1)], 1, (300, 300), "hexgen2", ["c n0", "c n1"], {"c0", "c1"}),
    # Three types: compute (H100, L40) prefills, bandwidth (A100) decodes, one L40 takes whole requests.
    (
        [(H100, 2), (A100, 2), (L40, 2)],
        50,
        (1200, 250),
        "hexgen2",
        ["c n2", "d n1", "d n1", "p n0", "p n0", "p n2"],
        {"p0", "p1", "p2", "c0"},
    ),
]


@pytest.mark.parametrize(("nodes", "gbps", "load", "solver", "groups", "limits"), CASES)
def test_plans_of_tiny_clusters(
    nodes: list[tuple[str, int]],
    gbps: float,
    load: tuple[int, int],
    solver: str,
    groups: list[str],
    limits: set[str],
) -> None:
    task = problem(cluster(*nodes, gbps=gbps), engine="vllm", load=lengths(*load))
    plan = schedule(task, solver=solver)
    assert sorted(f"{group.role[0]} {group.gpus[0].split('/')[0]}" for group in plan.groups) == groups
    assert set(plan.bottleneck.elements) == limits
    if solver == "hexgen2":
        best = schedule(task, solver="exhaustive").objective.value
        assert plan.objective.value == pytest.approx(best, rel=1e-6)
