"""The paper's solver, end to end."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.cost import shape
from hexgen2.cost.replica import CostModel
from hexgen2.scheduler import PROFILES, Problem, Progress, schedule
from hexgen2.simulator.placement import placement
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.cluster import Cluster, load_cluster, parse_cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.plan import Plan, parse_plan
from tests.scheduler.checks import check_plan
from tests.scheduler.support import A100, H100, L40, LARGE, SMALL, cluster, clusters, lengths, problem

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"


def shapes(plan: Plan) -> dict[str, list[str]]:
    """Group id → its stages as node×TP."""
    return {
        group.id: [f"{stage.gpus[0].split('/')[0]}×{stage.tp}" for stage in group.stages]
        for group in plan.groups
    }


def test_two_nodes_become_one_prefill_and_one_decode_group() -> None:
    # Long prompts, short answers: the H100s prefill, the A100s have bandwidth enough to decode.
    task = problem(cluster((H100, 1), (A100, 1), gbps=100), load=lengths(1500, 100))
    plan = schedule(task, solver="paper")
    assert shapes(plan) == {"p0": ["n0×1"], "d0": ["n1×1"]}
    assert plan.routes[0].share == pytest.approx(1)
    assert plan.bottleneck.elements == ("p0",)
    check_plan(plan, SMALL, task.lengths)


def test_a_slow_network_is_named_as_the_bottleneck() -> None:
    where = cluster((H100, 1), (A100, 1), gbps=0.1)
    plan = schedule(problem(where, load=lengths(1500, 100)), solver="paper")
    assert plan.bottleneck.elements == ("link n0→n1",)
    assert plan.bottleneck.text == "the link n0→n1 is at capacity"


def test_a_plan_is_valued_with_links_shared_and_says_what_the_flow_promised() -> None:
    # Two prefill nodes send to a decode node behind one NIC: counted singly, it is used twice over.
    where = cluster((H100, 1), (A100, 1), (A100, 1), gbps=2)
    nodes = [
        {**node, "nic_gbps": 2} if place == 1 else node for place, node in enumerate(where.document()["nodes"])
    ]
    task = problem(parse_cluster({**where.document(), "nodes": nodes}, "narrow"), load=lengths(1500, 100))
    plan = schedule(task, solver="paper")
    check_plan(plan, SMALL, task.lengths)
    (note,) = [note for note in plan.notes if "counted every route by itself" in note]
    promised = float(re.findall(r"found ([0-9.]+) requests", note)[0])
    assert promised == pytest.approx(2 * plan.throughput_rps, rel=0.01)


def test_long_answers_get_more_decode_groups() -> None:
    where = cluster((A100, 4), gbps=100)

    def decoding(load: tuple[int, int]) -> int:
        plan = schedule(problem(where, load=lengths(*load)), solver="paper")
        return sum(len(group.gpus) for group in plan.role_groups("decode"))

    assert decoding((200, 600)) > decoding((2000, 50))


@pytest.mark.parametrize("engine", ["any", "vllm", "vllm-asymmetric"])
def test_plans_keep_the_engines_rules(engine: str) -> None:
    where = cluster((H100, 2), (A100, 4), (L40, 4), gbps=10, links={(0, 1): 50})
    task = problem(where, LARGE, engine)
    plan = schedule(task, solver="paper")
    profile = PROFILES[engine]
    check_plan(plan, LARGE, task.lengths)
    tps = {group.id: tuple(stage.tp for stage in group.stages) for group in plan.groups}
    for group in plan.groups:
        assert profile.group_rule(group.role, tps[group.id]) is None
    for route in plan.routes:
        assert profile.route_rule(tps[route.source], tps[route.target]) is None


@given(clusters(), st.sampled_from(["any", "vllm"]), st.sampled_from([(1500, 100), (300, 300)]))
@settings(max_examples=20, deadline=None)
def test_plans_hold_on_random_clusters(where: Cluster, engine: str, load: tuple[int, int]) -> None:
    task = problem(where, engine=engine, load=lengths(*load))
    if len(where.gpus) < 2:
        with pytest.raises(InputError, match=r"2 replicas|no two groups|does not fit"):
            schedule(task, solver="paper")
        return
    plan = schedule(task, solver="paper")
    check_plan(plan, SMALL, task.lengths)
    assert parse_plan(plan.document(), "again").document() == plan.document()


@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_seed_gives_the_same_plan(seed: int) -> None:
    task = problem(cluster((H100, 2), (A100, 4), (L40, 3), gbps=10))
    first, second = (schedule(task, solver="paper", seed=seed).document() for _ in range(2))
    first["wall_s"] = second["wall_s"] = 0
    assert first == second


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_renaming_and_reordering_nodes_changes_nothing(order: tuple[int, ...]) -> None:
    where = cluster((H100, 2), (A100, 4), (L40, 3), gbps=10, links={(0, 2): 50})
    document = where.document()
    name = {f"n{place}": f"host-{9 - place}" for place in range(3)}
    nodes = [{**document["nodes"][place], "name": name[f"n{place}"]} for place in order]
    links = [
        {**link, "between": [name[end] for end in link["between"]]} for link in document["network"]["links"]
    ]
    renamed = parse_cluster(
        {"nodes": nodes, "network": {"default": document["network"]["default"], "links": links}}, "renamed"
    )
    assert schedule(problem(renamed), solver="paper").objective.value == pytest.approx(
        schedule(problem(where), solver="paper").objective.value, rel=1e-9
    )


def test_progress_rises_and_a_time_limit_ends_the_search() -> None:
    steps: list[Progress] = []
    task = problem(cluster((H100, 2), (A100, 4), (L40, 4), gbps=10))
    ticks = iter(range(100000))
    plan = schedule(
        task, solver="paper", time_limit_s=50, progress=steps.append, clock=lambda: float(next(ticks))
    )
    assert [step.value for step in steps] == sorted(step.value for step in steps)
    assert plan.objective.value <= steps[-1].value * (1 + 1e-9)  # the search counts routes singly
    longer: list[Progress] = []
    schedule(task, solver="paper", progress=longer.append)
    assert [step.value for step in longer[: len(steps)]] == [step.value for step in steps]
    assert len(longer) > len(steps)


def test_a_model_that_fits_nowhere_says_how_much_is_missing() -> None:
    with pytest.raises(
        InputError, match=r"large-70b does not fit: .*GiB lack at least \d+\.\d\d GiB; add GPUs"
    ):
        schedule(problem(cluster((L40, 2)), LARGE), solver="paper")


def test_one_replica_alone_cannot_be_disaggregated() -> None:
    with pytest.raises(InputError, match=r"2 replicas need .* GiB more than is usable; .*--solver hexgen2"):
        schedule(problem(cluster((A100, 3)), LARGE), solver="paper")


def test_an_unknown_solver_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match="no solver 'magic'; use one of"):
        schedule(problem(cluster((A100, 3))), solver="magic")


@pytest.mark.parametrize("model", ["llama-2-70b", "opt-30b"])
@pytest.mark.parametrize("workload", ["hphd", "lpld"])
@pytest.mark.parametrize("name", ["mixed-1", "mixed-2", "mixed-3", "mixed-4", "mixed-5", "homogeneous-8xh100"])
def test_shipped_clusters_plan(name: str, model: str, workload: str) -> None:
    task = Problem(
        cluster=load_cluster(EXAMPLES / f"{name}.yaml"),
        workload=workload,
        lengths=load_workload(workload).representative(128),
        cost=CostModel(load_model(model)),
        engine=PROFILES["vllm"],
    )
    # On the process's own time: another process on the machine must not fail the test.
    plan = schedule(task, solver="paper", time_limit_s=5, clock=time.process_time)
    check_plan(plan, task.model, task.lengths)


def test_the_local_test_bed_splits_into_one_prefill_and_two_decode_groups() -> None:
    task = Problem(
        cluster=load_cluster(EXAMPLES / "local-cpu.yaml"),
        workload="fixed:48/64",
        lengths=load_workload("fixed:48/64").representative(64),
        cost=CostModel(load_model("tiny-llama")),
        engine=PROFILES["vllm"],
    )
    plan = schedule(task, solver="paper")
    assert [group.role for group in plan.groups] == ["prefill", "decode", "decode"]


def test_a_prefill_group_short_of_memory_says_how_much_it_may_batch() -> None:
    """One batch in every stage, one being fetched and one that waits fit into its KV memory."""
    cost = CostModel(load_model("llama-2-70b"))
    task = Problem(
        cluster=load_cluster(EXAMPLES / "mixed-5.yaml"),
        workload="lphd",
        lengths=load_workload("lphd").representative(64),
        cost=cost,
        engine=PROFILES["any"],
    )
    plan = schedule(task, solver="paper", time_limit_s=0.2)
    for group in plan.groups:
        tokens = cost.max_kv_tokens(shape(plan.cluster, placement(plan, group)))
        budget = cost.settings.prefill_budget(tokens, len(group.stages))
        limited = group.role == "prefill" and budget < cost.settings.token_budget
        assert group.token_budget == (budget if limited else None)
        if limited:
            assert (len(group.stages) + 2) * budget <= tokens
    assert parse_plan(plan.document(), "again") == plan


@pytest.mark.parametrize(
    ("tokens", "stages", "budget"),
    [(100_000, 1, 8192), (24_576, 1, 8192), (12_000, 1, 4000), (5000, 3, 1000), (90, 3, 256)],
)
def test_the_budget_that_a_memory_keeps_flowing(tokens: int, stages: int, budget: int) -> None:
    assert CostModel(SMALL).settings.prefill_budget(tokens, stages) == budget
