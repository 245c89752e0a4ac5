"""What processes see around them: the addresses they are reached at, the numbers of their devices, their rank.

`serve` runs them on the hosts of the cluster file, where each host has one address. A container in a pod is
reached by the name of a service, learns its own address when it starts, and counts only the devices that it was
given. The compiler asks a `Site` for all three, so that both get their arguments from one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from hexgen2.deploy.hosts import device_numbers, serving_hosts
from hexgen2.specs.cluster import Cluster


@dataclass(frozen=True)
class Address:
    """``reach``: what others call it, in URLs and as the master of a group, an IP address or a name.
    ``listen``: what its HTTP server binds. ``own``: the IP address under which it makes itself known; the side
    channel of KV transfers binds it, which takes no name."""

    reach: str
    listen: str
    own: str


class Site(Protocol):
    """Where the processes of a deployment run."""

    def address(self, group: str, rank: int, node: str) -> Address:
        """The address of a group's process, which runs on ``node``."""
        ...

    def devices(self, gpus: tuple[str, ...]) -> tuple[int, ...]:
        """The numbers that the devices of one process have for it."""
        ...

    def node_rank(self, rank: int) -> str:
        """A process's rank in its group, as its arguments spell it."""
        ...


class HostSite(Site):
    """The hosts of the cluster file, with nothing between a process and its host: what `serve` uses."""

    def __init__(self, cluster: Cluster, used: Iterable[str]) -> None:
        """``used``: the nodes that processes run on. InputError for one that has no address."""
        self._hosts = serving_hosts(cluster, used)
        self._numbers = device_numbers(cluster, self._hosts)

    @override
    def address(self, group: str, rank: int, node: str) -> Address:
        host = self._hosts[node]
        return Address(reach=host, listen=host, own=host)

    def devices(self, gpus: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self._numbers[gpu] for gpu in gpus)

    def node_rank(self, rank: int) -> str:
        return str(rank)
