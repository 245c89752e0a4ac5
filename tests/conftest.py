"""What all tests share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.unlike_nodes import NODES, UnlikeNodes
from tests.waiting import HUNG_S

# The same examples in every run, whatever the machine's speed: a check that fails by chance is not believed.
# HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", settings.get_profile("same"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

PORTS_IN_A_BLOCK = 1024


@pytest.fixture(scope="session", autouse=True)
def _ports_of_its_own() -> Iterator[None]:
    """Each of xdist's workers looks for free ports in blocks of its own: a port that one has found, and on
    which nobody listens yet, must not be given to another.
    """
    with pytest.MonkeyPatch.context() as patch:
        if worker := os.environ.get("PYTEST_XDIST_WORKER"):
            from hexgen2.deploy import ports

            place, workers = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
            every = ports._shuffled_range

            def own() -> Iterator[int]:
                return (port for port in every() if port // PORTS_IN_A_BLOCK % workers == place)

            patch.setattr(ports, "_shuffled_range", own)
        yield


@pytest.fixture(scope="session")
def _unlike_nodes() -> Iterator[UnlikeNodes]:
    pytest.importorskip("ray", reason="needs the ray extra")
    from hexgen2.deploy.raycluster import connected

    nodes = UnlikeNodes()
    with connected(nodes.address):  # once for all: each connection starts its own worker processes
        yield nodes
    nodes.close()


@pytest.fixture
def unlike_nodes(_unlike_nodes: UnlikeNodes) -> UnlikeNodes:
    """A Ray cluster with all of its nodes, and this process connected to it (11 s for the first test)."""
    import ray

    _unlike_nodes.restore()
    deadline = time.monotonic() + HUNG_S
    while sum(node["Alive"] for node in ray.nodes()) != len(NODES) + 1:  # Ray may not know yet who died
        assert time.monotonic() < deadline, ray.nodes()
        time.sleep(0.2)
    return _unlike_nodes
