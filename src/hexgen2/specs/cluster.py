"""A cluster: nodes with GPUs of one type each, and the network between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, field_validator

from hexgen2.specs import files
from hexgen2.specs.base import Spec
from hexgen2.specs.catalog import gpu_price, gpu_type, gpu_type_names, parse_gpu_type
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GpuType, Link

GBPS = 1e9 / 8  # bytes/s in one gigabit per second
_MAX_GPUS_PER_NODE = 1024  # no machine has as many: more is a slip, and would fill the memory with link tables
_MAX_GPUS = 8192  # a table of the links between any two of them takes half a gigabyte

_LEAST_GBPS = 1e-6


def _no_slower_than_a_modem(gbps: float) -> float:
    if gbps < _LEAST_GBPS:
        raise ValueError(f"{gbps:g} is less than a kilobit per second; write gigabits per second")
    return gbps


Gbps = Annotated[float, Field(gt=0, le=1e6), AfterValidator(_no_slower_than_a_modem)]
"""Gigabits per second. What lies outside is a slip in the unit, and would overflow where it is divided by."""
HourlyPrice = Annotated[float, Field(ge=0, le=1e6)]
"""USD per GPU and hour."""


class LinkFigures(Spec):
    """A link as people write it: gigabits per second each way, milliseconds one way."""

    gbps: Gbps
    latency_ms: float = Field(default=0.5, ge=0)

    @property
    def link(self) -> Link:
        return Link(bandwidth=self.gbps * GBPS, latency=self.latency_ms * 1e-3)


class PairLink(LinkFigures):
    """The link between two named nodes."""

    between: tuple[str, str]


class Network(Spec):
    """Links between nodes: a default and exceptions to it."""

    default: LinkFigures | None = None
    links: tuple[PairLink, ...] = ()


class Node(Spec):
    """A machine with ``count`` GPUs of one type.

    ``nic_gbps`` caps what all its GPUs together send, and what they receive, over the network. ``host`` is the
    address that other nodes reach it by; it is needed for serving, not for planning.
    """

    name: str = Field(min_length=1)
    gpu: str
    count: int = Field(ge=1, le=_MAX_GPUS_PER_NODE)
    nic_gbps: Gbps | None = None
    price_per_gpu_hour: HourlyPrice | None = None
    intra_link: LinkFigures | None = None
    host: str | None = None

    @field_validator("name")
    @classmethod
    def _no_slash(cls, name: str) -> str:
        if "/" in name:
            raise ValueError(f"{name!r} has a slash; GPUs are called NODE/INDEX, so leave it out")
        return name


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a cluster. ``index`` counts over the cluster, ``node`` is the node's place in it."""

    id: str
    index: int
    node: int
    type: GpuType


class Cluster(Spec):
    """Nodes, network and the GPU types they use, checked against each other."""

    name: str = "cluster"
    nodes: tuple[Node, ...] = Field(min_length=1)
    network: Network = Network()
    inline_types: tuple[GpuType, ...] = ()

    @cached_property
    def gpus(self) -> tuple[Gpu, ...]:
        """Every GPU, in the order of the nodes."""
        inline = {kind.name: kind for kind in self.inline_types}
        gpus: list[Gpu] = []
        for place, node in enumerate(self.nodes):
            kind = inline.get(node.gpu) or gpu_type(node.gpu)
            gpus += [Gpu(f"{node.name}/{i}", len(gpus) + i, place, kind) for i in range(node.count)]
        return tuple(gpus)

    @cached_property
    def gpu_by_id(self) -> Mapping[str, Gpu]:
        return {gpu.id: gpu for gpu in self.gpus}

    def gpu_price(self, node: int) -> float:
        """USD per hour of one GPU of a node: its own price, else the catalog's, else 0 (own hardware)."""
        price = self.nodes[node].price_per_gpu_hour
        if price is None:
            price = gpu_price(self.nodes[node].gpu)
        return 0.0 if price is None else price

    @cached_property
    def price_per_hour(self) -> float:
        """USD per hour for all GPUs of the cluster."""
        return sum(node.count * self.gpu_price(place) for place, node in enumerate(self.nodes))

    def intra_link(self, node: int) -> Link:
        """The link between two GPUs of one node."""
        figures = self.nodes[node].intra_link
        return figures.link if figures else self.gpus[self.first_gpu(node)].type.link

    def first_gpu(self, node: int) -> int:
        """Index of a node's first GPU; its others follow it."""
        return sum(other.count for other in self.nodes[:node])

    def node_link(self, a: int, b: int) -> Link:
        """The link between two different nodes, capped by the NICs at both ends."""
        figures = self._pairs.get(frozenset((self.nodes[a].name, self.nodes[b].name))) or self.network.default
        assert figures is not None, "checked by parse_cluster"
        caps = [nic * GBPS for nic in (self.nodes[a].nic_gbps, self.nodes[b].nic_gbps) if nic is not None]
        link = figures.link
        return Link(bandwidth=min([link.bandwidth, *caps]), latency=link.latency)

    def link(self, a: int, b: int) -> Link:
        """The link between two different GPUs, by their indices."""
        node_a, node_b = self.gpus[a].node, self.gpus[b].node
        return self.intra_link(node_a) if node_a == node_b else self.node_link(node_a, node_b)

    def nic_bandwidth(self, node: int) -> float:
        """Bytes/s that a node can send, and receive, over its NIC; infinite when not given."""
        nic = self.nodes[node].nic_gbps
        return float("inf") if nic is None else nic * GBPS

    @cached_property
    def bandwidth(self) -> NDArray[np.float64]:
        """(GPUs, GPUs) bytes/s between any two GPUs; the diagonal is infinite."""
        return self._gpu_matrix("bandwidth", np.inf)

    @cached_property
    def latency(self) -> NDArray[np.float64]:
        """(GPUs, GPUs) seconds between any two GPUs; the diagonal is zero."""
        return self._gpu_matrix("latency", 0.0)

    def document(self) -> dict[str, Any]:
        """The cluster as a document that `parse_cluster` reads back."""
        document = self.model_dump(mode="json", exclude_none=True, exclude={"inline_types"})
        if self.inline_types:
            document["gpu_types"] = [_type_document(kind) for kind in self.inline_types]
        return document

    @cached_property
    def _pairs(self) -> Mapping[frozenset[str], LinkFigures]:
        return {frozenset(pair.between): pair for pair in self.network.links}

    def _gpu_matrix(self, figure: str, diagonal: float) -> NDArray[np.float64]:
        count = len(self.nodes)
        by_node = np.empty((count, count))
        for a in range(count):
            by_node[a, a] = getattr(self.intra_link(a), figure)
            for b in range(a):
                by_node[a, b] = by_node[b, a] = getattr(self.node_link(a, b), figure)
        places = np.array([gpu.node for gpu in self.gpus])
        matrix: NDArray[np.float64] = by_node[np.ix_(places, places)]
        np.fill_diagonal(matrix, diagonal)
        matrix.setflags(write=False)
        return matrix


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file; raises InputError that names the field and the mend."""
    return parse_cluster(files.read_mapping(path, "cluster file"), str(path))


def parse_cluster(document: Mapping[str, Any], source: str) -> Cluster:
    """Check a cluster document (from a file or from inside a plan)."""
    fields = dict(document)
    inline = fields.pop("gpu_types", None) or []
    if not isinstance(inline, list):
        raise InputError(source, "gpu_types", "is not a list", "write one entry per GPU type")
    types = tuple(parse_gpu_type(entry, source, f"gpu_types[{place}]") for place, entry in enumerate(inline))
    _check_types(types, source)
    if "inline_types" in fields:
        raise InputError(source, "inline_types", "is not a known field", "describe GPU types under gpu_types")
    if not fields.get("nodes"):
        raise InputError(source, "nodes", "is empty", "list at least one node with name, gpu and count")
    try:
        cluster = Cluster.model_validate({**fields, "inline_types": types})
    except ValidationError as error:
        raise InputError.from_validation(source, error) from None
    count = sum(node.count for node in cluster.nodes)
    if count > _MAX_GPUS:
        raise InputError(source, "nodes", f"{count} GPUs are more than {_MAX_GPUS}", "plan parts of it apart")
    _check_names(cluster, source)
    _check_links(cluster, source)
    return cluster


def _check_types(types: tuple[GpuType, ...], source: str) -> None:
    names = [kind.name for kind in types]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InputError(
                source, f"gpu_types[{place}].name", f"{name!r} is given twice", "give each type its own name"
            )


def _check_names(cluster: Cluster, source: str) -> None:
    known = [*gpu_type_names(), *(kind.name for kind in cluster.inline_types)]
    seen: set[str] = set()
    for place, node in enumerate(cluster.nodes):
        if node.name in seen:
            raise InputError(
                source, f"nodes[{place}].name", f"{node.name!r} is given twice", "give each node its own name"
            )
        seen.add(node.name)
        if node.gpu not in known:
            raise InputError(
                source,
                f"nodes[{place}].gpu",
                f"unknown GPU type {node.gpu!r}",
                f"use one of {', '.join(known)}, or describe it under gpu_types",
            )


def _check_links(cluster: Cluster, source: str) -> None:
    names = {node.name for node in cluster.nodes}
    seen: set[frozenset[str]] = set()
    for place, pair in enumerate(cluster.network.links):
        field = f"network.links[{place}].between"
        for name in pair.between:
            if name not in names:
                raise InputError(
                    source, field, f"there is no node {name!r}", f"name two of {', '.join(sorted(names))}"
                )
        key = frozenset(pair.between)
        if len(key) == 1:
            raise InputError(
                source, field, f"joins {pair.between[0]!r} to itself", "set intra_link at the node instead"
            )
        if key in seen:
            raise InputError(
                source, field, f"{' and '.join(sorted(key))} are linked twice", "keep one of the entries"
            )
        seen.add(key)
    if cluster.network.default is None:
        for a, first in enumerate(cluster.nodes):
            for second in cluster.nodes[:a]:
                if frozenset((first.name, second.name)) not in seen:
                    raise InputError(
                        source,
                        "network",
                        f"nothing joins {second.name!r} and {first.name!r}",
                        "add network.default or a link between them",
                    )


def _type_document(kind: GpuType) -> dict[str, Any]:
    return {
        "name": kind.name,
        "vendor": kind.vendor,
        "generation": kind.generation,
        "memory_gib": kind.memory_bytes / 2**30,
        "dense_tflops": kind.flops / 1e12,
        "dense_dtype": kind.dense_dtype,
        "memory_bandwidth_gb_s": kind.memory_bandwidth / 1e9,
        "link": {
            "kind": kind.link_kind,
            "gb_s": kind.link.bandwidth / 1e9,
            "latency_us": kind.link.latency * 1e6,
        },
    }
