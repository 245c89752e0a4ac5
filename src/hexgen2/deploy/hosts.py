"""At which address each node of a plan is reached, and which of its devices a process may see."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError

LOOPBACK = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether an address means "this machine" wherever it is used."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may be any machine


def serving_hosts(cluster: Cluster, used: Iterable[str]) -> dict[str, str]:
    """The address of each used node, by the node's name.

    A node's ``host`` if it has one. Without it, CPU nodes (the local test bed) and a plan's only node are
    taken to be this machine. Raises InputError for other nodes without a host, and for a mixture of loopback
    and other addresses, since a remote engine cannot reach this one at 127.0.0.1.
    """
    wanted = set(used)
    kinds = {cluster.nodes[gpu.node].name: gpu.type for gpu in cluster.gpus}
    hosts: dict[str, str] = {}
    for place, node in enumerate(cluster.nodes):
        if node.name not in wanted:
            continue
        if node.host is None and kinds[node.name].vendor != "cpu" and len(wanted) > 1:
            raise InputError(
                f"cluster {cluster.name}",
                f"nodes[{place}].host",
                f"node {node.name!r} has no address to serve at",
                f"give it one (host: ADDRESS; {LOOPBACK} if it is this machine)",
            )
        hosts[node.name] = node.host or LOOPBACK
    loopback = sorted(name for name, host in hosts.items() if is_loopback(host))
    remote = sorted(set(hosts) - set(loopback))
    if loopback and remote:
        place = next(place for place, node in enumerate(cluster.nodes) if node.name == loopback[0])
        raise InputError(
            f"cluster {cluster.name}",
            f"nodes[{place}].host",
            f"node {loopback[0]!r} is at {hosts[loopback[0]]}, which node {remote[0]!r} ({hosts[remote[0]]}) "
            "cannot reach",
            "give it the address by which the other nodes reach it",
        )
    return hosts


def device_numbers(cluster: Cluster, hosts: Mapping[str, str]) -> dict[str, int]:
    """The number that each GPU of the served nodes has on its host.

    Nodes that share an address share its devices, in the order of the cluster file: with `a` and `b` of two
    GPUs each on one host, `b/0` is device 2, whether `a` is served or not.
    """
    numbers: dict[str, int] = {}
    taken: dict[str | None, int] = {}
    for gpu in cluster.gpus:
        node = cluster.nodes[gpu.node]
        host = hosts.get(node.name, node.host)
        if node.name in hosts:
            numbers[gpu.id] = taken.get(host, 0)
        taken[host] = taken.get(host, 0) + 1
    return numbers
