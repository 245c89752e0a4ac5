"""Request classes in plans: where they gain, with shares that add up; who routes keeps to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.cost import CostModel, Moments
from hexgen2.deploy import compile_plan
from hexgen2.deploy.ports import counted_ports
from hexgen2.scheduler import PROFILES, Problem, schedule
from hexgen2.scheduler.class_program import Way, solve
from hexgen2.scheduler.classes import WORTHWHILE, members, splits, with_classes
from hexgen2.simulator import poisson, simulate
from hexgen2.specs import Lengths, Plan, load_cluster, parse_plan
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.plan import Role, Slo

from .support import H100, L40, cluster, lengths, problem

EXAMPLE = Path(__file__).parents[2] / "examples" / "clusters" / "h100-and-a6000.yaml"


@pytest.fixture(scope="module")
def asked() -> Problem:
    return Problem(
        cluster=load_cluster(EXAMPLE),
        workload="azure-code",
        lengths=load_workload("azure-code").representative(256),
        cost=CostModel(load_model("llama-2-13b")),
        engine=PROFILES["vllm"],
        objective="goodput",
        slo=Slo(ttft_s=1.0, tpot_s=0.08),
        model_name="llama-2-13b",
    )


@pytest.fixture(scope="module")
def plan(asked: Problem) -> Plan:
    return schedule(asked)


def test_the_example_gains(plan: Plan) -> None:
    assert plan.class_routing is not None
    assert plan.class_routing.gain >= WORTHWHILE
    assert plan.class_routing.throughput_rps == pytest.approx(
        plan.objective.value * (1 + plan.class_routing.gain)
    )
    assert sum(one.fraction for one in plan.classes) == pytest.approx(1)
    for one in plan.classes:
        ways = [route.class_shares[one.name] for route in plan.routes]
        ways += [group.class_shares[one.name] for group in plan.role_groups("colocated")]
        assert sum(ways) == pytest.approx(1)
        ends_of: dict[Role, str] = {"prefill": "source", "decode": "target"}
        for role, ends in ends_of.items():
            for group in plan.role_groups(role):
                own = [r.class_shares[one.name] for r in plan.routes if getattr(r, ends) == group.id]
                assert group.class_shares[one.name] == pytest.approx(sum(own))
    assert parse_plan(plan.document(), "test") == plan


def test_shares_of_all_requests_stay_as_they_were(asked: Problem, plan: Plan) -> None:
    alike = schedule(asked, solver="colocated")
    assert not alike.classes
    for group in plan.groups:
        assert group.share * plan.throughput_rps <= group.capacity_rps * (1 + 1e-6)


def test_the_simulator_sends_every_class_its_way(asked: Problem, plan: Plan) -> None:
    rng = np.random.default_rng(1)
    requests = poisson(load_workload("azure-code").sample(400, rng), 0.5, rng)  # no group is ever full
    timeline = simulate(plan, asked.cost, requests, load_correction=0.0).timeline
    for one in plan.classes:
        mine = members(Lengths(requests.inputs, requests.outputs), one) > 0
        for place, path in enumerate(timeline.paths):
            expected = plan.group_by_id[path.target].class_shares[one.name] * mine.sum()
            assert (timeline.path[mine] == place).sum() == pytest.approx(expected, abs=2)


def test_the_coordinator_is_told(asked: Problem, plan: Plan) -> None:
    model = asked.model.model_copy(update={"location": "/models/llama"})
    document = plan.document()
    for place, node in enumerate(document["cluster"]["nodes"]):
        node["host"] = f"10.0.0.{place + 1}"
    config = compile_plan(parse_plan(document, "test"), model, counted_ports(20_000)).coordinator
    assert config.classes == plan.classes
    assert {e.group_id: e.class_shares for e in config.engines if e.role == "colocated"} == {
        group.id: group.class_shares for group in plan.role_groups("colocated")
    }


@pytest.mark.parametrize("solver", ["paper", "colocated", "distserve"])
def test_reference_solvers_route_all_requests_alike(solver: str) -> None:
    assert not schedule(problem(cluster((H100, 2), (L40, 2), gbps=100)), solver=solver).classes


def test_no_classes_where_all_requests_are_alike() -> None:
    same = Lengths(np.full(32, 500), np.full(32, 100))
    task = problem(cluster((H100, 2), (L40, 2), gbps=100), load=same)
    assert list(splits(same)) == []
    found = schedule(task)
    assert not found.classes
    assert with_classes(task, found) == found


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 900)), min_size=8, max_size=64),
)
def test_every_request_is_of_one_class(pairs: list[tuple[int, int]]) -> None:
    load = Lengths(np.array([i for i, _ in pairs]), np.array([o for _, o in pairs]))
    for classes in splits(load):
        inside = np.array([members(load, one) for one in classes])
        assert (inside.sum(axis=0) == 1).all()
        np.testing.assert_allclose(inside.mean(axis=1), [one.fraction for one in classes])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_own_shares_never_serve_less_than_the_same_shares_for_all(data: st.DataObject) -> None:
    """The program with classes against the one where a request is the mean over all classes."""
    count, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    floats = st.floats(0.05, 5.0)
    seconds = np.array([[data.draw(floats) for _ in range(classes)] for _ in range(2 * count + 1)])
    parts = np.array([data.draw(floats) for _ in range(classes)])
    parts = parts / parts.sum()
    tokens = np.array([data.draw(floats) for _ in range(classes)])
    ways = [Way(None, 2 * count)]
    for source in range(count):
        for target in range(count):
            link = data.draw(st.floats(0.0, 1.0))
            ways.append(Way(source, count + target, (("link", link), ("shared", 0.1)) if link else ()))
    apart = solve(seconds, ways, parts, tokens)
    alike = solve((seconds @ parts)[:, None], ways, np.ones(1), np.array([tokens @ parts]))
    assert apart is not None
    assert alike is not None
    assert apart.sum() >= alike.sum() * (1 - 1e-4)
    np.testing.assert_allclose(apart.sum(axis=1), parts * apart.sum(), rtol=1e-4, atol=1e-7)


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=20
    ).filter(lambda rows: any(times for _, _, times in rows))
)
def test_weights_count_as_repetitions(rows: list[tuple[int, int, int]]) -> None:
    inputs, outputs, times = (np.array(column) for column in zip(*rows, strict=True))
    weighted = Moments.of(Lengths(inputs, outputs), times.astype(float))
    repeated = Moments.of(Lengths(np.repeat(inputs, times), np.repeat(outputs, times)))
    for name in ("input", "input_sq", "output", "context", "longest_input", "longest"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name))
    assert weighted.context_std == pytest.approx(repeated.context_std, abs=1e-4)
    assert np.mean(weighted.prompts) == pytest.approx(repeated.input)


def test_more_groups_than_a_program_may_have_are_left_alone(asked: Problem) -> None:
    found = schedule(replace(asked, lengths=lengths()))
    many = found.model_copy(update={"groups": found.groups * 3000})
    assert with_classes(asked, many) is many
