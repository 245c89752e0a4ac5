"""Where the processes of a plan run in a Ray cluster, and the ports that are free there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from hexgen2 import __version__
from hexgen2.deploy.hosts import device_numbers
from hexgen2.deploy.raycluster.actor import survey
from hexgen2.deploy.raycluster.connection import RayCluster
from hexgen2.deploy.raycluster.nodes import OPTION, RayNode
from hexgen2.deploy.site import Address
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError

PORTS = 16
"""Ports that a node is asked for at a time."""


class RaySite:
    """The nodes of a Ray cluster under the addresses that Ray itself uses between them."""

    def __init__(self, cluster: Cluster, found: Mapping[str, RayNode]) -> None:
        self._found = found
        # Plan nodes on one Ray node share its devices. Ray chooses among these; the numbers only say how many.
        self._numbers = device_numbers(cluster, {name: node.id for name, node in found.items()})

    def address(self, group: str, rank: int, node: str) -> Address:  # noqa: ARG002 (`Site` has them)
        host = self._found[node].address
        return Address(reach=host, listen=host, own=host)

    def devices(self, gpus: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self._numbers[gpu] for gpu in gpus)

    def node_rank(self, rank: int) -> str:
        return str(rank)


class RayPorts:
    """Ports that are free on the nodes, asked for over Ray; the same question finds out whether the nodes can
    run the engines. Blocking."""

    def __init__(self, ray: RayCluster) -> None:
        self._ray = ray
        self._nodes: dict[str, RayNode] = {}
        self._ready: defaultdict[str, list[int]] = defaultdict(list)
        self._given: defaultdict[str, set[int]] = defaultdict(set)

    def survey(
        self, nodes: Collection[RayNode], vendors: Mapping[str, Collection[str]], transfers: bool
    ) -> None:
        """Ask all nodes at once. ``vendors``: of the devices that engines need on each node (by id). InputError
        for a node that has another HexGen-2 or lacks the engine."""
        asked = [
            (
                node,
                self._ray.call(node, survey, node.address, PORTS, sorted(vendors.get(node.id, ())), transfers),
            )
            for node in {node.id: node for node in nodes}.values()
        ]
        for node, reference in asked:
            version, ports = self._ray.result(node, reference)
            if version != __version__:
                raise InputError(
                    OPTION,
                    f"node {node.title}",
                    f"has hexgen2 {version}, and this is {__version__}",
                    "install the same version on all nodes",
                )
            self._nodes[node.address] = node
            self._keep(node.address, ports)

    def __call__(self, host: str) -> int:
        """A port on this host that was not given before."""
        while not self._ready[host]:
            node = self._nodes[host]
            _, ports = self._ray.result(node, self._ray.call(node, survey, host, PORTS, (), False))
            self._keep(host, ports)
        return self._ready[host].pop(0)

    def _keep(self, host: str, ports: Collection[int]) -> None:
        new = [port for port in ports if port not in self._given[host]]
        self._given[host].update(new)
        self._ready[host] += new
