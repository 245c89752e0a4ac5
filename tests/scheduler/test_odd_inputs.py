"""Legal but odd clusters, models and loads: a plan that keeps to the rules, or a line that says why none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.cost.memory import Settings
from hexgen2.cost.replica import CostModel
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.specs.cluster import Cluster, parse_cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.model import MLA, Model, MoE
from hexgen2.specs.plan import Slo
from hexgen2.specs.workload import Lengths
from tests.scheduler.checks import check_plan
from tests.scheduler.support import SMALL, cluster, lengths, problem

TYPES = ("H100-80G-SXM", "A100-80G-PCIe", "L40", "T4", "MI300X")


@st.composite
def odd_clusters(draw: st.DrawFn) -> Cluster:
    """One to four nodes of one to five GPUs, links of any speed and latency, with and without NICs."""
    gbps, latency = st.sampled_from([1e-5, 0.1, 10.0, 400.0]), st.sampled_from([0.0, 0.001, 0.2, 500.0])
    figures = st.fixed_dictionaries({"gbps": gbps, "latency_ms": latency})
    count = draw(st.integers(1, 4))
    nodes = [
        {
            "name": f"n{place}",
            "gpu": draw(st.sampled_from(TYPES)),
            "count": draw(st.integers(1, 5 if count < 3 else 2)),
            "nic_gbps": draw(st.none() | gbps),
            "intra_link": draw(st.none() | figures),
            "price_per_gpu_hour": draw(st.sampled_from([None, 0.0, 3.0])),
        }
        for place in range(count)
    ]
    given_here = [{key: value for key, value in node.items() if value is not None} for node in nodes]
    links = [{"between": ["n0", "n1"], **draw(figures)}] if count > 1 else []
    network = {"default": draw(figures), "links": links} if count > 1 or draw(st.booleans()) else {}
    return parse_cluster({"nodes": given_here, "network": network}, "odd cluster")


@st.composite
def odd_models(draw: st.DrawFn) -> Model:
    """One layer and many, heads that TP does not divide, experts, latent attention, any width of numbers."""
    kv_heads = draw(st.sampled_from([1, 3, 8]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 7]))
    latent = MLA(kv_lora_rank=64, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    mixture = MoE(
        experts=draw(st.sampled_from([1, 8, 64])),
        active=1,
        intermediate_size=draw(st.sampled_from([64, 4096])),
        dense_layers=draw(st.sampled_from([0, 1, 40])),
    )
    mla = draw(st.none() | st.just(latent))
    return Model(
        name="odd",
        layers=draw(st.sampled_from([1, 2, 5, 24])),
        hidden_size=draw(st.sampled_from([64, 8192])),
        heads=heads,
        kv_heads=kv_heads if mla is None else heads,
        head_dim=draw(st.sampled_from([32, 128])),
        intermediate_size=draw(st.sampled_from([64, 28672])),
        vocab_size=draw(st.sampled_from([100, 128_256])),
        tied_embeddings=draw(st.booleans()),
        gated_mlp=draw(st.booleans()),
        position_embeddings=draw(st.sampled_from([0, 2050])),
        max_positions=4096,
        moe=draw(st.none() | st.just(mixture)),
        mla=mla,
        weight_bytes=draw(st.sampled_from([0.56, 2.0, 8.0])),
        kv_bytes=draw(st.sampled_from([1.0, 2.0, 16.0])),
    )


@st.composite
def odd_problems(draw: st.DrawFn) -> Problem:
    """All of it together, with settings at their ends and targets that may be out of reach."""
    prompt, answer = (
        draw(st.sampled_from([1, 40, 3000, 20_000])),
        draw(st.sampled_from([1, 2, 50, 2000])),
    )
    how = Settings(
        max_batch=draw(st.sampled_from([1, 2, 256])),
        token_budget=draw(st.sampled_from([256, 8192])),
        chunked_prefill=draw(st.booleans()),
    )
    model = draw(odd_models())
    load: Lengths = lengths(prompt, answer, draw(st.sampled_from([1, 2, 16])))
    return Problem(
        cluster=draw(odd_clusters()),
        workload="odd load",
        lengths=load,
        cost=CostModel(model, settings=how),
        engine=PROFILES[draw(st.sampled_from(sorted(PROFILES)))],
        objective=draw(st.sampled_from(["throughput", "goodput"])),
        slo=Slo(
            ttft_s=draw(st.sampled_from([None, 0.05, 100.0])), tpot_s=draw(st.sampled_from([None, 0.005, 1.0]))
        ),
        rate=draw(st.sampled_from([None, 1e-3, 1e4])),
    )


@given(odd_problems(), st.sampled_from(["hexgen2", "paper", "colocated", "distserve"]))
@settings(max_examples=40, deadline=None)
def test_odd_problems_are_planned_or_told_in_one_line(task: Problem, solver: str) -> None:
    try:
        plan = schedule(task, solver=solver)
    except InputError:
        return  # always one line
    check_plan(plan, task.model, task.lengths)
    tps = {group.id: tuple(stage.tp for stage in group.stages) for group in plan.groups}
    for group in plan.groups:
        assert task.engine.group_rule(group.role, tps[group.id]) is None
    for route in plan.routes:
        assert task.engine.route_rule(tps[route.source], tps[route.target]) is None


@pytest.mark.parametrize("solver", ["hexgen2", "hexgen", "paper"])
def test_a_search_with_time_left_and_nothing_to_shake_ends_in_one_line(solver: str) -> None:
    """All memory together is enough, but no group can be laid out: one layer, heads for 1 or 11 GPUs."""
    whole = SMALL.model_copy(update={"layers": 1, "heads": 11, "kv_heads": 11, "weight_bytes": 40.0})
    task = problem(cluster(*[("T4", 1)] * 12), whole, "vllm")
    with pytest.raises(InputError, match="can run hold"):
        schedule(task, solver=solver, time_limit_s=0.2)
