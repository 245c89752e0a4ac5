"""What the processes of an export see around them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from typing_extensions import override

from hexgen2.deploy.export.words import NODE_RANK, OWN_ADDRESS, dns_label
from hexgen2.deploy.hosts import is_loopback
from hexgen2.deploy.site import Address, HostSite, Site
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError


class NamedHosts(HostSite):
    """Hosts as `serve` has them, but a node without an address is reached by its own name, which the network's
    DNS (or /etc/hosts) has to know. A process at a name makes itself known by its IP address, found when it
    starts."""

    def __init__(self, cluster: Cluster, used: set[str], addresses: Mapping[str, str]) -> None:
        super().__init__(_with_hosts(cluster, used, addresses), used)

    def address(self, group: str, rank: int, node: str) -> Address:
        given = super().address(group, rank, node)
        if not is_name(given.reach):
            return given
        return Address(reach=given.reach, listen=OWN_ADDRESS, own=OWN_ADDRESS)

    def host(self, node: str) -> str:
        """The address of a node."""
        return super().address("", 0, node).reach


class ContainerHosts(NamedHosts):
    """The same, for containers that are given their GPUs one by one and count them from 0."""

    def devices(self, gpus: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(range(len(gpus)))

    def host_devices(self, gpus: tuple[str, ...]) -> tuple[int, ...]:
        """The numbers of the devices on their host."""
        return super().devices(gpus)


class Pods(Site):
    """Every process in a pod of its own: groups are reached by the name of a service, pods know their own IP
    address, and the device plugin gives them just their GPUs."""

    def __init__(self, services: Mapping[str, str]) -> None:
        """``services``: the name of each group's service, by the group's id."""
        self._services = services

    @override
    def address(self, group: str, rank: int, node: str) -> Address:
        return Address(reach=self._services[group], listen="0.0.0.0", own=OWN_ADDRESS)

    def devices(self, gpus: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(range(len(gpus)))

    @override
    def node_rank(self, rank: int) -> str:
        return NODE_RANK


def is_name(host: str) -> bool:
    """Whether a host is a name that others than this machine have to resolve."""
    if is_loopback(host):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def _with_hosts(cluster: Cluster, used: set[str], addresses: Mapping[str, str]) -> Cluster:
    """The cluster with an address for each used node that `serving_hosts` would not find one for."""
    known = {node.name for node in cluster.nodes}
    for name in addresses:
        if name not in known:
            raise InputError(
                "--address",
                name,
                "is not a node of the plan's cluster",
                f"name one of {', '.join(sorted(known))}",
            )
    hosts = {node.name: addresses.get(node.name, node.host) for node in cluster.nodes}
    vendors = {cluster.nodes[gpu.node].name: gpu.type.vendor for gpu in cluster.gpus}
    elsewhere = any(host is not None and not is_loopback(host) for name, host in hosts.items() if name in used)
    one_machine = len(used) == 1 or all(vendors[name] == "cpu" for name in used if hosts[name] is None)
    if elsewhere or not one_machine:
        hosts |= {name: dns_label(name) for name in used if hosts[name] is None}
    nodes = tuple(node.model_copy(update={"host": hosts[node.name]}) for node in cluster.nodes)
    return cluster.model_copy(update={"nodes": nodes})
