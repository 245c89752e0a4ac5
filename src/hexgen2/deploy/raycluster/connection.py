"""The connection to a Ray cluster. Ray is imported here and nowhere else at import time."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from hexgen2.deploy.raycluster.nodes import OPTION, RayNode, living
from hexgen2.specs.errors import InputError

ANSWER_S = 60.0
"""How long a call of a pinned task may take, its Python process started included."""
CONNECT_S = 3.0


def import_ray() -> ModuleType:
    """The `ray` package; InputError where it is not installed."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a warning of Ray's asks for a decision
    try:
        import ray
    except ImportError:
        raise InputError("ray", "", "is not installed", "run `pip install 'hexgen2[ray]'`") from None
    package: ModuleType = ray
    return package


class RayCluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: ModuleType) -> None:
        self.ray = ray

    @property
    def own(self) -> str:
        """The id of the node that this process runs on."""
        return str(self.ray.get_runtime_context().get_node_id())

    def nodes(self) -> tuple[RayNode, ...]:
        """The nodes that are alive."""
        return living(self.ray.nodes())

    def available(self) -> Mapping[str, Mapping[str, float]]:
        """What each node has left, by its id and Ray's names for resources."""
        from ray._private.state import available_resources_per_node

        left: Mapping[str, Mapping[str, float]] = available_resources_per_node()
        return left

    def on(self, node_id: str) -> Any:
        """The scheduling strategy that runs something on that node and nowhere else."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node_id, soft=False)

    def call(self, node: RayNode, function: Callable[..., Any], *arguments: Any) -> Any:
        """A reference to what a function of this package returns on a node; it takes no resources there."""
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": self.on(node.id)}
        return self.ray.remote(function).options(**options).remote(*arguments)

    def result(self, node: RayNode, reference: Any, timeout_s: float = ANSWER_S) -> Any:
        """What a reference stands for. InputError where the node did not do what was asked; an InputError of
        the function itself gets the node's name."""
        try:
            return self.ray.get(reference, timeout=timeout_s)
        except self.ray.exceptions.RayError as error:
            raise trouble(node, error) from None


def trouble(node: RayNode, error: Exception) -> InputError:
    """What went wrong on a node, in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, InputError):
        place = f"{cause.source}: {cause.field}" if cause.field else cause.source
        return InputError(OPTION, f"node {node.title}", f"{place}: {cause.problem}", cause.mend)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    words = next((line for line in reversed(lines) if "Error" in line), lines[0])
    return InputError(
        OPTION,
        f"node {node.title}",
        f"does not do what it is asked ({words[:200]})",
        "check with `ray status` that it is up, and that it has the same hexgen2 and Python",
    )


@contextmanager
def connected(address: str | None, option: str = "--ray-address") -> Iterator[RayCluster]:
    """Connected to the cluster at ``address`` (HOST:PORT, `auto`; by default RAY_ADDRESS, else the cluster that
    runs on this machine). InputError where there is none.

    ``option``: what the user calls it. A process that is connected already stays so, whatever the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield RayCluster(ray)
        return
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    _check(address, option)
    try:
        ray.init(
            address=address,
            namespace="hexgen2",
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        words = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            option,
            address,
            f"cannot be joined ({words.strip()[:200]})",
            "run this on a node of the cluster; `ray status` must answer there",
        ) from None
    try:
        yield RayCluster(ray)
    finally:
        ray.shutdown()


def _check(address: str, option: str) -> None:
    """InputError for an address where nothing listens: Ray would try for a minute and then end this
    process."""
    if address.startswith("ray://"):
        raise InputError(
            option,
            address,
            "is that of a Ray client server, and engines are started from inside the cluster",
            "run this on a node of the cluster, without the option",
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), CONNECT_S):
        return
    raise InputError(
        option, address, "nothing listens there", "start the cluster's head with `ray start --head`"
    )


async def awaited(reference: Any, timeout_s: float) -> Any:
    """What a reference stands for; TimeoutError after that time."""
    return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_s)
