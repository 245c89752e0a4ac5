"""Members, classes of nodes and links, and the order that ignores names."""

from __future__ import annotations

from itertools import permutations

import pytest

from hexgen2.scheduler.topology import Topology, canonical, combined, members_of, size, without
from tests.scheduler.support import A100, H100, L40, cluster


def test_members_add_and_subtract() -> None:
    a, b = ((0, 2), (2, 1)), ((0, 1), (1, 3))
    assert combined(a, b) == ((0, 3), (1, 3), (2, 1))
    assert without(combined(a, b), b) == a
    assert members_of({1: 0, 0: 2}) == ((0, 2),)
    assert size(b) == 4


def test_equal_nodes_and_links_share_a_class() -> None:
    view = Topology(cluster((H100, 2), (H100, 4), (L40, 2), gbps=10, links={(0, 2): 25}))
    assert view.node_class[0] == view.node_class[1] != view.node_class[2]
    assert view.link_class[0, 1] == view.link_class[1, 2] != view.link_class[0, 2]
    assert view.link(0, 2).bandwidth == pytest.approx(25e9 / 8)
    assert view.link(0, 0) == view.types[0].link


def test_slowest_link_joins_the_worst_of_both() -> None:
    view = Topology(cluster((H100, 2), (H100, 4), (L40, 2), gbps=10, links={(0, 2): 25}))
    slowest = view.slowest([(0, 1), (0, 2), (0, 0)])
    assert slowest is not None
    assert slowest.bandwidth == pytest.approx(10e9 / 8)
    assert slowest.latency == pytest.approx(0.2e-3)
    assert view.slowest([]) is None


def test_the_canonical_order_ignores_names_and_file_order() -> None:
    base = cluster((A100, 2), (A100, 2), (A100, 2), (L40, 4), gbps=10, links={(0, 3): 50, (1, 2): 25})
    document = base.document()
    views = set()
    for order in permutations(range(4)):
        shuffled = base.model_validate(
            {
                **{key: document[key] for key in ("name", "network")},
                "nodes": [document["nodes"][place] for place in order],
            }
        )
        ordered = canonical(shuffled)
        assert {node.name for node in ordered.nodes} == {"n0", "n1", "n2", "n3"}
        view = Topology(ordered)
        # n1 and n2 are alike and may change places; all figures must come out equal.
        views.add((view.counts, tuple(kind.name for kind in view.types), view.bandwidth.tobytes()))
    assert len(views) == 1
