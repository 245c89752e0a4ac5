"""The parts of `benchmarks/testbed.py` that need no bed: what is drawn, and the plans that ours are compared
with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hexgen2.coordinator import CoordinatorConfig
from hexgen2.cost import Efficiencies
from hexgen2.cost.profile_files import load_profile
from hexgen2.deploy import coordinator_config
from hexgen2.deploy.testbed import cores_of
from hexgen2.emulator import EmulatedEngine
from hexgen2.loadgen.client import Load, measure
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.plan import Plan, Role

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def config_of(plan: Plan) -> CoordinatorConfig:
    return coordinator_config(plan, {group.id: f"http://{group.id}" for group in plan.groups}, ("tiny-llama",))


def equal(roles: dict[str, Role]) -> Plan:
    from testbed_clusters import COMPUTE_BOUND, WORKLOAD, cost_model
    from testbed_plans import equal_plan

    return equal_plan(COMPUTE_BOUND, roles, WORKLOAD, cost_model(Efficiencies()))


async def test_the_simulator_gets_the_requests_that_the_client_sends() -> None:
    from testbed_compare import drawn

    async with EmulatedEngine().running() as engine:
        load = Load(engine.url, load_workload("lpld"), 30, rate_rps=300.0, seed=7)
        await measure(load, Console(quiet=True))
        bodies: list[dict[str, Any]] = [one.body for one in engine.received if one.path.endswith("completions")]
    requests = drawn(load).requests
    sent = sorted((len(body["prompt"]), body["max_tokens"]) for body in bodies)
    assert sent == sorted(zip(requests.inputs.tolist(), requests.outputs.tolist(), strict=True))
    assert requests.arrivals_s[0] == 0


@pytest.mark.parametrize(
    ("roles", "shares"),
    [
        (("prefill", "decode", "decode", "decode"), {"p0": 1, "d0": 1 / 3, "d1": 1 / 3, "d2": 1 / 3}),
        (("prefill", "decode", "prefill", "decode"), {"p0": 0.5, "p1": 0.5, "d0": 0.5, "d1": 0.5}),
        (("colocated",) * 4, {"c0": 0.25, "c1": 0.25, "c2": 0.25, "c3": 0.25}),
        (("colocated", "colocated", "prefill", "decode"), {"p0": 0.5, "d0": 0.5, "c0": 0.25, "c1": 0.25}),
    ],
)
def test_an_equal_split_gives_each_group_of_a_role_as_much(
    roles: tuple[Role, ...], shares: dict[str, float]
) -> None:
    plan = equal(dict(zip("abcd", roles, strict=True)))
    assert {group.id: group.share for group in plan.groups} == pytest.approx(shares)
    assert len({route.share for route in plan.routes}) <= 1
    assert config_of(plan).routes or roles == ("colocated",) * 4


def test_round_robin_knows_neither_shares_nor_load() -> None:
    from testbed_plans import round_robin

    plan = equal({"a": "prefill", "b": "decode", "c": "decode", "d": "colocated"})
    groups = [
        group.model_copy(update={"share": {"p0": 0.4, "d0": 0.3, "d1": 0.1, "c0": 0.6}[group.id]})
        for group in plan.groups
    ]
    routes = [
        route.model_copy(update={"share": share}) for route, share in zip(plan.routes, (0.3, 0.1), strict=True)
    ]
    uneven = plan.model_copy(update={"groups": tuple(groups), "routes": tuple(routes)})
    blind = round_robin(config_of(uneven))
    assert [route.share for route in blind.routes] == pytest.approx([1 / 3, 1 / 3])
    assert {engine.group_id: engine.share for engine in blind.engines} == pytest.approx(
        {"p0": 2 / 3, "d0": 1 / 3, "d1": 1 / 3, "c0": 1 / 3}
    )
    assert blind.limits.load_correction == 0


@pytest.mark.parametrize("colocated", [False, True])
def test_the_best_equal_split_uses_links_only_where_it_has_to(colocated: bool) -> None:
    """Four equal devices behind slow links: colocated groups where those may be chosen, else each device is in
    one of the two roles."""
    from testbed_clusters import LINK_BOUND, WORKLOAD, cost_model
    from testbed_plans import best_equal

    plan = best_equal(LINK_BOUND, WORKLOAD, cost_model(Efficiencies()), colocated=colocated)
    assert sorted(group.gpus[0] for group in plan.groups) == ["a/0", "b/0", "c/0", "d/0"]
    roles = {group.role for group in plan.groups}
    assert roles == ({"colocated"} if colocated else {"prefill", "decode"})


@pytest.mark.parametrize(
    ("setting", "pairs"), [("LINK_BOUND", [(0, 2), (1, 3)]), ("COMPUTE_BOUND", [(0, 1), (2, 3)])]
)
def test_hand_overs_are_measured_over_the_fastest_links(setting: str, pairs: list[tuple[int, int]]) -> None:
    import testbed_clusters
    from testbed_calibrate import paired

    assert paired(getattr(testbed_clusters, setting)) == pairs


def test_the_shipped_profile_names_the_beds_devices() -> None:
    from testbed_clusters import CORES

    shipped = load_profile("cpu-testbed")
    assert set(shipped.gpus) == set(shipped.fits) == set(CORES)
    assert all(efficiency.handoff_overhead_s > 0 for efficiency in shipped.gpus.values())
    assert any(efficiency.send_byte_s > 0 for efficiency in shipped.gpus.values())
    for record in shipped.fits.values():
        assert record.median_error["prefill"] < 0.08
        assert record.median_error["decode"] < 0.08


def test_the_beds_leave_processor_for_the_coordinator_and_the_client() -> None:
    from testbed_clusters import COMPUTE_BOUND, LINK_BOUND

    for cluster in (LINK_BOUND, COMPUTE_BOUND):
        assert sum(cores_of(gpu.type) for gpu in cluster.gpus) <= 1.1
