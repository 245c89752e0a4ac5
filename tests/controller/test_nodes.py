from __future__ import annotations

import pytest

from hexgen2.controller.carry import Seat
from hexgen2.controller.nodes import lost_groups, lost_nodes, usable_gpus
from hexgen2.specs.plan import Stage
from tests.controller.cases import nodes


def seat(name: str, *gpus: str) -> Seat:
    return Seat(name, "colocated", (Stage(gpus=gpus, tp=len(gpus), first_layer=0, layers=12),))


SEATS = (seat("c0", "n0/0"), seat("c1", "n0/1"), seat("c2", "n1/0", "n2/0"), seat("c3", "n2/1"))


@pytest.mark.parametrize(
    ("lost", "alive", "expected"),
    [
        ((), {}, set()),
        (("c0",), {}, set()),
        (("c0", "c1"), {}, {"n0"}),
        (("c0", "c1"), {"n0": True}, set()),
        (("c2",), {}, {"n1"}),  # n2 still has a group that lives
        (("c2", "c3"), {}, {"n1", "n2"}),
        (("c2", "c3"), {"n2": True}, {"n1"}),
        ((), {"n3": False}, {"n3"}),
    ],
)
def test_a_node_is_gone_when_all_its_groups_are(
    lost: tuple[str, ...], alive: dict[str, bool], expected: set[str]
) -> None:
    assert lost_nodes(SEATS, lost, alive) == expected


def test_a_group_that_is_being_started_again_is_not_lost() -> None:
    down = {"c0": 3.0, "c1": 60.0, "c2": 60.0, "c3": 0.0}
    assert lost_groups(down, 5.0, returning=["c2"]) == {"c1"}


def test_what_is_left_to_plan_with() -> None:
    everything = {gpu.id for gpu in nodes().gpus}
    assert usable_gpus(nodes(), SEATS, (), ()) == everything
    assert usable_gpus(nodes(), SEATS, ("c0", "c1"), {"n0"}) == everything - {"n0/0", "n0/1"}
    # The node lives, so it is the engine that cannot run on these GPUs.
    assert usable_gpus(nodes(), SEATS, ("c3",), ()) == everything - {"n2/1"}
    # One of its nodes is gone: the GPU on the other is free.
    assert usable_gpus(nodes(), SEATS, ("c2",), {"n1"}) == everything - {"n1/0", "n1/1"}
