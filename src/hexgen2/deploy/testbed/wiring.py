"""Which namespaces, addresses and links a cluster becomes, and the iproute2 commands that make them. Pure.

Every node is a network namespace. Between two nodes lies a veth pair of their own, with a token bucket on both
ends at the rate that the cluster gives this pair: the links that KV caches and pipeline stages share, as the
cost model has them. Besides, each node hangs on a bridge, where the machine itself (the coordinator, clients)
reaches it. A node has one address; routes of one host each lead to the other nodes over their pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GpuType

Command = tuple[str, ...]

PREFIX = "hx"
UPLINK = "eth0"
"""A node's end of its cable to the bridge."""

MTU = 9000
"""Large packets, so that sending costs the engines little of their share of the processor."""

QUEUE_MS = 50
"""How long a packet may wait for tokens before it is dropped."""

TICK_S = 0.004
"""A token bucket holds what its link carries in so long, at least `LEAST_BURST`. With less, what comes in while
the kernel sees to something else (a tick at 250 Hz) is lost; with more, transfers after a pause are faster than
the link."""

LEAST_BURST = 2**16
"""Bytes; the largest packet that TCP hands down at once."""

WHOLE_CORE = "cpu-1c"
"""The catalog's type that is one core of a CPU."""

MOST_NODES = 99


def cores_of(gpu: GpuType) -> float:
    """The part of a core that a CPU device is: its memory bandwidth to that of a whole core of the catalog.

    Example: 8.75 GB/s beside the 35 of `cpu-1c`: a quarter.
    """
    return gpu.memory_bandwidth / gpu_type(WHOLE_CORE).memory_bandwidth


@dataclass(frozen=True)
class TokenBucket:
    """tc's `tbf` for a rate in bytes/s."""

    rate: float

    @property
    def burst_bytes(self) -> int:
        return max(LEAST_BURST, round(self.rate * TICK_S))

    @property
    def arguments(self) -> Command:
        """Example: 12.5e6 bytes/s: ("tbf", "rate", "100000000bit", "burst", "65536", "latency", "50ms")."""
        rate, burst = f"{round(self.rate * 8)}bit", str(self.burst_bytes)
        return ("tbf", "rate", rate, "burst", burst, "latency", f"{QUEUE_MS}ms")


@dataclass(frozen=True)
class Wiring:
    """A cluster as namespaces. ``tag``: four hexadecimal digits that make this bed's names its own."""

    cluster: Cluster
    tag: str

    def __post_init__(self) -> None:
        if len(self.cluster.nodes) > MOST_NODES:
            raise InputError(
                f"cluster {self.cluster.name}",
                "nodes",
                f"are {len(self.cluster.nodes)}",
                f"a test bed has at most {MOST_NODES}",
            )
        for place in range(len(self.cluster.nodes)):
            kind = self.cluster.gpus[self.cluster.first_gpu(place)].type
            if kind.vendor != "cpu":
                raise InputError(
                    f"cluster {self.cluster.name}",
                    f"nodes[{place}].gpu",
                    f"{kind.name} is no CPU device",
                    "describe the test bed's devices under gpu_types with vendor: cpu",
                )

    @property
    def bridge(self) -> str:
        return f"{PREFIX}{self.tag}br"

    @property
    def subnet(self) -> str:
        """Of the range that is set apart for measuring (RFC 2544), so that it is nobody's."""
        number = int(self.tag, 16)
        return f"198.{18 + (number >> 8 & 1)}.{number & 255}"

    @property
    def host_address(self) -> str:
        """The machine's own, at the bridge."""
        return f"{self.subnet}.254"

    def namespace(self, node: int) -> str:
        return f"{PREFIX}{self.tag}-{node}"

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(self.namespace(node) for node in range(len(self.cluster.nodes)))

    def address(self, node: int) -> str:
        return f"{self.subnet}.{node + 1}"

    def devices(self, node: int) -> tuple[str, ...]:
        """A node's interfaces that lead to the others; the uplink where it is alone."""
        others = [other for other in range(len(self.cluster.nodes)) if other != node]
        return tuple(f"to{other}" for other in others) or (UPLINK,)

    def cables(self) -> tuple[str, ...]:
        """The nodes' cables, at the bridge's end."""
        return tuple(f"{PREFIX}{self.tag}n{node}" for node in range(len(self.cluster.nodes)))

    def hosted(self) -> Cluster:
        """The cluster with the nodes' addresses as their hosts."""
        nodes = tuple(
            node.model_copy(update={"host": self.address(place)})
            for place, node in enumerate(self.cluster.nodes)
        )
        return self.cluster.model_copy(update={"nodes": nodes})

    def uplink_rate(self, node: int) -> float:
        """Bytes/s between a node and the bridge: its network card's, or that of its fastest link."""
        nic = self.cluster.nic_bandwidth(node)
        if nic != float("inf"):
            return nic
        others = [other for other in range(len(self.cluster.nodes)) if other != node]
        if not others:
            return self.cluster.intra_link(node).bandwidth
        return max(self.cluster.node_link(node, other).bandwidth for other in others)

    def setup(self) -> list[Command]:
        """Everything that has to be run, in order."""
        commands = [
            ("ip", "link", "add", self.bridge, "mtu", str(MTU), "type", "bridge"),
            ("ip", "address", "add", f"{self.host_address}/24", "dev", self.bridge),
            ("ip", "link", "set", self.bridge, "up"),
        ]
        for node in range(len(self.cluster.nodes)):
            commands += self._node(node)
        for a, b in combinations(range(len(self.cluster.nodes)), 2):
            commands += self._pair(a, b)
        return commands

    def _node(self, node: int) -> Iterator[Command]:
        space, cable = self.namespace(node), self.cables()[node]
        inside = ("ip", "-netns", space)
        bucket = TokenBucket(self.uplink_rate(node)).arguments
        yield ("ip", "netns", "add", space)
        yield (*inside, "link", "set", "lo", "up")
        yield (
            *("ip", "link", "add", cable, "mtu", str(MTU), "type", "veth"),
            *("peer", "name", UPLINK, "mtu", str(MTU), "netns", space),
        )
        yield ("ip", "link", "set", cable, "master", self.bridge, "up")
        yield (*inside, "address", "add", f"{self.address(node)}/24", "dev", UPLINK)
        yield (*inside, "link", "set", UPLINK, "up")
        yield ("tc", "qdisc", "add", "dev", cable, "root", *bucket)
        yield ("tc", "-netns", space, "qdisc", "add", "dev", UPLINK, "root", *bucket)

    def _pair(self, a: int, b: int) -> Iterator[Command]:
        bucket = TokenBucket(self.cluster.node_link(a, b).bandwidth).arguments
        yield (
            *("ip", "-netns", self.namespace(a), "link", "add", f"to{b}", "mtu", str(MTU), "type", "veth"),
            *("peer", "name", f"to{a}", "mtu", str(MTU), "netns", self.namespace(b)),
        )
        for here, there in ((a, b), (b, a)):
            inside = ("ip", "-netns", self.namespace(here))
            # UCX uses interfaces that have an address and lead to the peer: the same one on all of a node.
            yield (*inside, "address", "add", f"{self.address(here)}/32", "dev", f"to{there}")
            yield (*inside, "link", "set", f"to{there}", "up")
            yield (
                *(*inside, "route", "add", f"{self.address(there)}/32"),
                *("dev", f"to{there}", "src", self.address(here)),
            )
            yield (
                *("tc", "-netns", self.namespace(here), "qdisc", "add", "dev", f"to{there}", "root"),
                *bucket,
            )
