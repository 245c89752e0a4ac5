"""Whole plans: what must be conserved, in which order things happen, and that plans keep what they promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hexgen2.cost import CostModel, shape
from hexgen2.simulator import Requests, SimulationResult, offline, poisson, replay, simulate
from hexgen2.simulator.placement import placement
from hexgen2.specs import Lengths, Plan, load_plan
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.plan import Slo
from hexgen2.specs.workload import Workload

MakePlan = Callable[..., Plan]
TRACE = Path(__file__).parents[3] / "shared" / "data" / "azure_conv_2023.csv"


def lengths_of(count: int, seed: int = 0, longest: int = 900) -> Lengths:
    rng = np.random.default_rng(seed)
    return Lengths(rng.integers(1, longest, size=count), rng.integers(1, 120, size=count))


@pytest.fixture
def mixed(make_plan: MakePlan) -> Plan:
    """Two prefill groups (one a pipeline), two decode groups, one colocated group; slow links."""
    return make_plan(
        [
            ("p0", "prefill", 0.5, 32, [(1, 5), (2, 3)]),
            ("p1", "prefill", 0.2, 32, [(1, 8)]),
            ("d0", "decode", 0.4, 16, [(2, 8)]),
            ("d1", "decode", 0.3, 16, [(1, 4), (1, 4)]),
            ("c0", "colocated", 0.3, 16, [(1, 8)]),
        ],
        [("p0", "d0", 0.35), ("p0", "d1", 0.15), ("p1", "d0", 0.05), ("p1", "d1", 0.15)],
        gbps=4,
        node={"nic_gbps": 5},
    )


def check_conservation(result: SimulationResult, requests: Requests, cost: CostModel) -> None:
    document, timeline = result.document(), result.timeline
    done = ~np.isnan(timeline.end)
    assert document["requests"] == len(requests)
    assert document["completed"] == done.sum()
    assert document["completed"] + document["failed"] == len(requests)
    groups = document["per_group"]
    assert sum(figures["output_tokens"] for figures in groups.values()) == requests.outputs[done].sum()
    split = np.array([timeline.path[n] >= 0 and timeline.paths[timeline.path[n]].prefill is not None
                      for n in range(len(requests))])  # fmt: skip
    # One copy of each request's cache crosses; no TP here exceeds the KV heads.
    moved = float(requests.inputs[done & split].sum()) * cost.model.kv_bytes_per_token
    assert document["kv_transfer"]["bytes"] == pytest.approx(moved)
    prefilled = sum(f["prompt_tokens"] for f in groups.values() if f["role"] == "prefill")
    assert prefilled == requests.inputs[done & split].sum()
    for figures in groups.values():
        assert 0 <= figures["busy"] <= 1 + 1e-9

    slack = 1e-9
    both = done & split
    assert (timeline.prefilled[done] >= timeline.arrival[done] - slack).all()
    assert (timeline.transfer_start[both] >= timeline.prefilled[both] - slack).all()
    assert (timeline.transferred[both] > timeline.transfer_start[both]).all()
    assert (timeline.first[both] > timeline.transferred[both]).all()
    assert (timeline.end[done] >= timeline.first[done] - slack).all()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), count=st.integers(1, 300), rate=st.sampled_from([5.0, 50.0, None]))
def test_conservation_and_order(
    mixed: Plan, cost: CostModel, seed: int, count: int, rate: float | None
) -> None:
    lengths = lengths_of(count, seed)
    requests = poisson(lengths, rate, np.random.default_rng(seed)) if rate else offline(lengths)
    check_conservation(simulate(mixed, cost, requests), requests, cost)


def test_little_memory_preempts_and_still_ends(make_plan: MakePlan, cost: CostModel) -> None:
    plan = make_plan([("p", "prefill", 1, 32, [(1, 8)]), ("d", "decode", 1, 32, [(1, 8)])], [("p", "d", 1.0)])
    layout = shape(plan.cluster, placement(plan, plan.group_by_id["d"]))
    room = cost.max_kv_tokens(layout)
    count = 60
    requests = offline(Lengths(np.full(count, room // 8), np.full(count, room // 8)))
    result = simulate(plan, cost, requests)
    check_conservation(result, requests, cost)
    assert result.results.failed == 0
    assert result.document()["per_group"]["d"]["preemptions"] > 0
    assert result.document()["per_group"]["d"]["peak_kv_tokens"] <= room


def test_a_decode_group_that_is_sent_all_at_once_preempts_more(make_plan: MakePlan, cost: CostModel) -> None:
    plan = make_plan(
        [("p", "prefill", 1, 32, [(4, 8)]), ("d", "decode", 1, 10, [(1, 8)])], [("p", "d", 1.0)], gbps=4
    )
    room = cost.max_kv_tokens(shape(plan.cluster, placement(plan, plan.group_by_id["d"])))
    requests = offline(Lengths(np.full(150, room // 24), np.full(150, room // 24)))
    held, flooded = (simulate(plan, cost, requests, hold_back=hold_back) for hold_back in (True, False))
    for result in (held, flooded):
        check_conservation(result, requests, cost)
    assert held.document()["per_group"]["d"]["preemptions"] == 0
    assert flooded.document()["per_group"]["d"]["preemptions"] > 0


def test_quick_prompts_do_not_pile_up_before_slow_answers(make_plan: MakePlan, cost: CostModel) -> None:
    """The prefill group could compute 32 prompts for the four requests that are answered at once."""
    groups = [("p", "prefill", 1, 32, [(1, 8)]), ("d", "decode", 1, 4, [(1, 8)])]
    requests = offline(Lengths(np.full(200, 96), np.full(200, 100)))
    figures = simulate(make_plan(groups, [("p", "d", 1.0)]), cost, requests).document()["per_group"]
    assert figures["p"]["peak_kv_tokens"] <= 6 * 96
    assert figures["d"]["mean_batch"] > 3.8


def test_what_could_never_fit_fails_and_the_rest_does_not(mixed: Plan, cost: CostModel) -> None:
    requests = offline(Lengths(np.array([100, 10**7, 100]), np.array([5, 5, 10**7])))
    result = simulate(mixed, cost, requests)
    assert np.isnan(result.timeline.end).tolist() == [False, True, True]
    assert (result.results.failed, result.timeline.path.tolist()[1:]) == (2, [-1, -1])


def test_shares_are_kept(mixed: Plan, cost: CostModel) -> None:
    requests = poisson(lengths_of(2000), 10.0, np.random.default_rng(0))
    timeline = simulate(mixed, cost, requests, load_correction=0.0).timeline
    for place, path in enumerate(timeline.paths):
        assert (timeline.path == place).mean() == pytest.approx(path.share, abs=2e-3)


def test_one_request_alone_takes_the_sum_of_its_parts(make_plan: MakePlan, cost: CostModel) -> None:
    plan = make_plan(
        [("p", "prefill", 1, 32, [(1, 4), (1, 4)]), ("d", "decode", 1, 32, [(2, 8)])], [("p", "d", 1.0)], gbps=8
    )
    result = simulate(plan, cost, Requests(np.array([3.0]), np.array([700]), np.array([3])))
    layouts = {group.id: shape(plan.cluster, placement(plan, group)) for group in plan.groups}
    prefill = cost.prefill_seconds(layouts["p"], [700])
    transfer = 700 * cost.model.kv_bytes_per_token / 1e9 + 1e-4
    steps = [cost.decode_step_seconds(layouts["d"], 1, 700 + j) for j in (1, 2, 3)]
    document = result.document()
    assert document["ttft_s"]["mean"] == pytest.approx(prefill + transfer + steps[0])
    assert document["e2e_s"]["p99"] == pytest.approx(prefill + transfer + sum(steps))
    assert document["tpot_s"]["p50"] == pytest.approx(sum(steps[1:]) / 2)
    assert document["kv_transfer"]["mean_s"] == pytest.approx(transfer)


def test_a_busy_group_asks_for_a_cache_between_two_steps(make_plan: MakePlan, cost: CostModel) -> None:
    plan = make_plan([("p", "prefill", 1, 32, [(1, 8)]), ("d", "decode", 1, 32, [(1, 8)])], [("p", "d", 1.0)])
    layout = shape(plan.cluster, placement(plan, plan.group_by_id["d"]))
    requests = Requests(np.array([0.0, 1.0]), np.array([700, 500]), np.array([1000, 3]))
    timeline = simulate(plan, cost, requests).timeline
    steps = [cost.decode_step_seconds(layout, 1, 700 + j) for j in range(2, 1001)]
    ends = timeline.first[0] + np.concatenate([[0.0], np.cumsum(steps)])
    asked = timeline.transfer_start
    assert asked[0] == timeline.prefilled[0], "an idle group asks at once"
    after = ends[np.searchsorted(ends, timeline.prefilled[1])]
    assert timeline.prefilled[1] < after < timeline.end[0]
    assert asked[1] == pytest.approx(after, abs=1e-9)


def test_equal_arguments_give_equal_results(mixed: Plan, cost: CostModel) -> None:
    runs = [
        simulate(mixed, cost, poisson(lengths_of(500), 30.0, np.random.default_rng(4))).document()
        for _ in range(2)
    ]
    assert json.dumps(runs[0]) == json.dumps(runs[1])


def test_no_requests(mixed: Plan, cost: CostModel) -> None:
    document = simulate(mixed, cost, offline(lengths_of(0))).document()
    assert (document["requests"], document["throughput_rps"], document["ttft_s"]["mean"]) == (0, 0.0, None)


def test_goodput_counts_by_the_given_targets(mixed: Plan, cost: CostModel) -> None:
    requests = poisson(lengths_of(400), 20.0, np.random.default_rng(0))
    result = simulate(mixed, cost, requests, slo=Slo(ttft_s=0.2))
    ttft = result.timeline.first - result.timeline.arrival
    assert result.document()["slo"]["attainment"] == pytest.approx((ttft <= 0.2).mean())


def test_progress_is_told(mixed: Plan, cost: CostModel) -> None:
    told: list[tuple[int, int]] = []
    simulate(mixed, cost, offline(lengths_of(1200)), progress=lambda *what: told.append(what))
    assert told == [(500, 1200), (1000, 1200), (1200, 1200)]


def test_a_trace_is_replayed_or_squeezed() -> None:
    trace = Workload("t", trace=lengths_of(11), arrivals_s=np.arange(11) * 2.0 + 5)
    assert replay(trace).arrivals_s.tolist() == [2.0 * n for n in range(11)]
    assert replay(trace, 3).arrivals_s.tolist() == [0, 2, 4]
    assert replay(trace, rate_rps=5).arrivals_s[-1] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no arrival"):
        replay(Workload("t", trace=lengths_of(3)))


def test_requests_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="back in time"):
        Requests(np.array([1.0, 0.5]), np.array([1, 1]), np.array([1, 1]))
    with pytest.raises(ValueError, match="different lengths"):
        Requests(np.array([1.0]), np.array([1, 1]), np.array([1, 1]))


def steady_rate(result: SimulationResult) -> float:
    """Requests/s that end in the middle half of all: without filling up and running dry."""
    ends = np.sort(result.timeline.end)
    low, high = len(ends) // 4, len(ends) * 3 // 4
    return float((high - low) / (ends[high] - ends[low]))


class TestSaturation:
    """A plan under more load than it can take serves what the cost model says."""

    @pytest.mark.parametrize("stages", [[(1, 8)], [(2, 8)], [(1, 3), (1, 5)]])
    @pytest.mark.parametrize(
        ("role", "chunked"),
        [("prefill", True), ("decode", True), ("colocated", True), ("colocated", False)],
    )
    def test_one_group(
        self, make_plan: MakePlan, cost: CostModel, role: str, chunked: bool, stages: list[tuple[int, int]]
    ) -> None:
        cost = replace(cost, settings=replace(cost.settings, chunked_prefill=chunked))
        # The other group of a pair has many GPUs and, so that it is not the bottleneck, easy work.
        lengths = lengths_of(2500, longest=250)
        if role == "prefill":
            lengths = Lengths(lengths.inputs, np.minimum(lengths.outputs, 4))
        group = ("x", role, 1.0, 32, stages)
        if role == "colocated":
            plan = make_plan([group])
        elif role == "prefill":
            plan = make_plan([group, ("y", "decode", 1.0, 32, [(8, 8)])], [("x", "y", 1.0)], gbps=8000)
        else:
            plan = make_plan([("y", "prefill", 1.0, 32, [(8, 8)]), group], [("y", "x", 1.0)], gbps=8000)
        layout = shape(plan.cluster, placement(plan, plan.group_by_id["x"]))
        planned = {
            "prefill": cost.prefill_capacity,
            "decode": cost.decode_capacity,
            "colocated": cost.colocated_capacity,
        }[role](layout, lengths)
        groups = [
            found.model_copy(update={"max_batch": planned.max_batch}) if found.id == "x" else found
            for found in plan.groups
        ]
        plan = plan.model_copy(update={"groups": tuple(groups)})
        result = simulate(plan, cost, offline(lengths))
        assert steady_rate(result) == pytest.approx(planned.rps, rel=0.05)

    @pytest.mark.parametrize("stages", [[(1, 8)], [(1, 4), (1, 4)], [(1, 3), (1, 3), (1, 2)]])
    def test_a_prefill_group_short_of_memory(
        self, make_plan: MakePlan, cost: CostModel, stages: list[tuple[int, int]]
    ) -> None:
        """With the engine's own budget one batch takes all of the memory and the other stages stand idle."""
        lengths = lengths_of(2500, longest=250)
        lengths = Lengths(lengths.inputs, np.minimum(lengths.outputs, 4))
        pair = [("x", "prefill", 1.0, 256, stages), ("y", "decode", 1.0, 256, [(8, 8)])]
        plan = make_plan(pair, [("x", "y", 1.0)], gbps=8000)
        layout = shape(plan.cluster, placement(plan, plan.group_by_id["x"]))
        settings = replace(cost.settings, max_batch=256, communicator_bytes=0.0)
        while CostModel(cost.model, settings=settings).max_kv_tokens(layout) > 1500:
            settings = replace(settings, memory_utilisation=settings.memory_utilisation - 0.0005)
        short = CostModel(cost.model, settings=settings)
        planned = short.prefill_capacity(layout, lengths).rps
        budget = settings.prefill_budget(short.max_kv_tokens(layout), len(stages))
        assert budget < settings.token_budget
        first = plan.groups[0].model_copy(update={"token_budget": budget})
        kept = plan.model_copy(update={"groups": (first, *plan.groups[1:])})
        # Capacities count whole prompts in a batch, engines cut them to fill it.
        assert 0.95 * planned < steady_rate(simulate(kept, short, offline(lengths))) < 1.15 * planned
        if stages[1:]:
            assert steady_rate(simulate(plan, short, offline(lengths))) < 0.9 * planned

    def test_a_link(self, make_plan: MakePlan, cost: CostModel) -> None:
        lengths = lengths_of(1000)
        plan = make_plan(
            [("p", "prefill", 1.0, 32, [(8, 8)]), ("d", "decode", 1.0, 32, [(8, 8)])],
            [("p", "d", 1.0)],
            gbps=0.8,
        )
        planned = 0.1e9 / (float(lengths.inputs.mean()) * cost.model.kv_bytes_per_token)
        assert steady_rate(simulate(plan, cost, offline(lengths))) == pytest.approx(planned, rel=0.05)


@pytest.fixture(scope="module")
def twenty_gpus() -> tuple[Plan, CostModel]:
    """A plan of Llama-2-70B for `hphd` on the 20 GPUs of examples/clusters/mixed-1.yaml, as once planned."""
    plan = load_plan(Path(__file__).with_name("plan_20_gpus.json"))
    return plan, CostModel(load_model(plan.model))


@pytest.mark.parametrize(("load", "lost"), [(1.0, 0.05), (1.5, 0.06)])
def test_a_plan_at_saturation_keeps_its_promise(
    twenty_gpus: tuple[Plan, CostModel], load: float, lost: float
) -> None:
    """Under overload requests for a full decode group fill the prefill groups' memory: docs/simulator.md."""
    plan, cost = twenty_gpus
    rng = np.random.default_rng(0)
    lengths = load_workload(plan.workload).sample(8000, rng)
    result = simulate(plan, cost, poisson(lengths, load * plan.throughput_rps, rng))
    assert steady_rate(result) == pytest.approx(plan.throughput_rps, rel=lost)


def test_the_azure_trace(twenty_gpus: tuple[Plan, CostModel]) -> None:
    if not TRACE.exists():
        pytest.skip(f"needs {TRACE.name} in ../shared/data")
    plan, cost = twenty_gpus
    requests = replay(load_workload(str(TRACE)))
    result = simulate(plan, cost, requests)
    check_conservation(result, requests, cost)
    assert result.results.failed == 0
