from __future__ import annotations

import pytest

from hexgen2.cost.network import allgather_s, allreduce_s, boundary_s
from hexgen2.specs import Link

LINK = Link(bandwidth=100e9, latency=5e-6)


@pytest.mark.parametrize(
    ("size", "tp", "link", "expected"),
    [
        (1e6, 1, LINK, 0.0),
        (1e6, 1, None, 0.0),
        (1e6, 2, LINK, 10e-6 + 2 * 5e-6),  # 2·½·10 µs + 2·5 µs
        (1e6, 4, LINK, 15e-6 + 6 * 5e-6),
        (0.0, 8, LINK, 14 * 5e-6),
    ],
)
def test_allreduce(size: float, tp: int, link: Link | None, expected: float) -> None:
    assert allreduce_s(size, tp, link) == pytest.approx(expected)
    assert allgather_s(size, tp, link) == pytest.approx(expected / 2)


@pytest.mark.parametrize(("tp", "latencies"), [(1, 0), (2, 2), (4, 2.5), (8, 2.5)])
def test_gpus_that_reach_all_others_at_once_take_fewer_latencies(tp: int, latencies: float) -> None:
    assert allreduce_s(0.0, tp, LINK, hops=2.5) == pytest.approx(latencies * LINK.latency)


def test_boundary() -> None:
    assert boundary_s(1e6, LINK) == pytest.approx(15e-6)
    assert boundary_s(1e6, None) == 0.0
