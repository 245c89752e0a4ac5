"""What can be rented: offers of nodes with their prices, how many there are, and what joins them.

A mix (how many nodes of each offer) becomes a `Cluster`, so that everything else sees an ordinary cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from hexgen2.specs import files
from hexgen2.specs.base import Spec
from hexgen2.specs.catalog import gpu_price
from hexgen2.specs.cluster import (
    Cluster,
    Gbps,
    HourlyPrice,
    LinkFigures,
    Network,
    Node,
    PairLink,
    parse_cluster,
)
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import GpuType

Mix = tuple[int, ...]
"""Nodes of each offer, in the catalog's order."""
MOST_NODES = 64
"""Nodes of one offer that are looked at where it sets no limit of its own."""


class Offer(Spec):
    """Nodes of one sort that can be had: ``count`` GPUs each, ``available`` nodes, at a price.

    ``price_per_gpu_hour`` (USD) is the package's own price of the GPU type where it is left out. ``nic_gbps``
    and ``intra_link`` are as in a cluster file. Offers of one ``region`` may share a link to those of another.
    """

    name: str = Field(min_length=1)
    gpu: str
    count: int = Field(ge=1, le=1024)
    price_per_gpu_hour: HourlyPrice | None = None
    available: int = Field(default=MOST_NODES, ge=1, le=1024)
    region: str | None = Field(default=None, min_length=1)
    nic_gbps: Gbps | None = None
    intra_link: LinkFigures | None = None

    @model_validator(mode="after")
    def _can_name_nodes(self) -> Offer:
        if "/" in self.name:
            raise ValueError(f"name {self.name!r} has a slash; leave it out")
        return self

    @property
    def gpu_price(self) -> float:
        """USD per GPU and hour; `parse_offers` checked that there is one."""
        price = self.price_per_gpu_hour
        if price is None:
            price = gpu_price(self.gpu)
        return 0.0 if price is None else price

    @property
    def node_price(self) -> float:
        """USD per node and hour."""
        return self.count * self.gpu_price


class Offers(Spec):
    """A catalog of rentable nodes. Links join offers or regions; one with itself: two nodes inside it."""

    name: str = "catalog"
    offers: tuple[Offer, ...] = Field(min_length=1)
    network: Network = Network()
    inline_types: tuple[GpuType, ...] = ()

    @cached_property
    def _links(self) -> Mapping[frozenset[str], LinkFigures]:
        return {frozenset(pair.between): pair for pair in self.network.links}

    def figures(self, a: int, b: int) -> LinkFigures | None:
        """The link between a node of one offer and another node of an offer (the same one where a is b).

        What names the offers goes before what names their regions, then the default; None when nothing does.
        """
        first, second = self.offers[a], self.offers[b]
        found = self._links.get(frozenset((first.name, second.name)))
        if found is None and first.region is not None and second.region is not None:
            found = self._links.get(frozenset((first.region, second.region)))
        return found or self.network.default

    def price(self, mix: Sequence[int]) -> float:
        """USD per hour of a mix."""
        return sum(count * offer.node_price for count, offer in zip(mix, self.offers, strict=True))

    def gpus(self, mix: Sequence[int]) -> int:
        """GPUs of a mix."""
        return sum(count * offer.count for count, offer in zip(mix, self.offers, strict=True))

    def cluster(self, mix: Sequence[int], name: str | None = None) -> Cluster:
        """The cluster that a mix makes, nodes named after their offers: ``h100-1``, ``h100-2``, ..."""
        nodes: list[Node] = []
        places: list[int] = []
        for place, (count, offer) in enumerate(zip(mix, self.offers, strict=True)):
            for number in range(1, count + 1):
                places.append(place)
                nodes.append(
                    Node(
                        name=f"{offer.name}-{number}",
                        gpu=offer.gpu,
                        count=offer.count,
                        nic_gbps=offer.nic_gbps,
                        price_per_gpu_hour=offer.gpu_price,
                        intra_link=offer.intra_link,
                    )
                )
        default = self.network.default
        links: list[PairLink] = []
        for (first, a), (second, b) in combinations(zip(nodes, places, strict=True), 2):
            figures = self.figures(a, b)
            assert figures is not None, "checked by parse_offers"
            if default is None or (figures.gbps, figures.latency_ms) != (default.gbps, default.latency_ms):
                between = (first.name, second.name)
                links.append(PairLink(between=between, gbps=figures.gbps, latency_ms=figures.latency_ms))
        return Cluster(
            name=name or self.name,
            nodes=tuple(nodes),
            network=Network(default=default, links=tuple(links)),
            inline_types=self.inline_types,
        )


def load_offers(path: str | Path) -> Offers:
    """Read and check a catalog of rentable nodes; raises InputError that names the field and the mend."""
    return parse_offers(files.read_mapping(path, "catalog of nodes to rent"), str(path))


def parse_offers(document: Mapping[str, Any], source: str) -> Offers:
    """Check a catalog document. GPU types are checked as in a cluster file, whose ``gpu_types`` it may have."""
    fields = dict(document)
    if not fields.get("offers"):
        raise InputError(
            source, "offers", "is empty", "list at least one offer with name, gpu, count and available"
        )
    inline = fields.pop("gpu_types", None)
    if "inline_types" in fields:
        raise InputError(source, "inline_types", "is not a known field", "describe GPU types under gpu_types")
    try:
        offers = Offers.model_validate(fields)
    except ValidationError as error:
        raise InputError.from_validation(source, error) from None
    offers = offers.model_copy(update={"inline_types": _inline_types(offers, inline, source)})
    _check_offers(offers, source)
    _check_links(offers, source)
    return offers


def _inline_types(offers: Offers, inline: object, source: str) -> tuple[GpuType, ...]:
    """The catalog's own GPU types, checked with the offers' types by the reader of cluster files."""
    nodes = [
        {"name": str(place), "gpu": offer.gpu, "count": offer.count}
        for place, offer in enumerate(offers.offers)
    ]
    document = {"nodes": nodes, "gpu_types": inline, "network": {"default": {"gbps": 1}}}
    try:
        return parse_cluster(document, source).inline_types
    except InputError as error:
        field = error.field.replace("nodes[", "offers[")
        raise InputError(source, field, error.problem, error.mend) from None


def _check_offers(offers: Offers, source: str) -> None:
    seen: set[str] = set()
    for place, offer in enumerate(offers.offers):
        if offer.name in seen:
            raise InputError(
                source,
                f"offers[{place}].name",
                f"{offer.name!r} is given twice",
                "give each offer its own name",
            )
        seen.add(offer.name)
        if offer.price_per_gpu_hour is None and gpu_price(offer.gpu) is None:
            raise InputError(
                source,
                f"offers[{place}].price_per_gpu_hour",
                f"is missing and {offer.gpu} has no price in the package",
                "add the price in USD per GPU and hour",
            )
    if seen & {offer.region for offer in offers.offers}:
        both = sorted(seen & {offer.region for offer in offers.offers if offer.region})
        place = next(place for place, offer in enumerate(offers.offers) if offer.region in both)
        raise InputError(
            source, f"offers[{place}].region", f"{both[0]!r} is also the name of an offer", "rename one of them"
        )


def _check_links(offers: Offers, source: str) -> None:
    names = {offer.name for offer in offers.offers}
    regions = {offer.region for offer in offers.offers if offer.region is not None}
    seen: set[frozenset[str]] = set()
    for place, pair in enumerate(offers.network.links):
        field = f"network.links[{place}].between"
        for end in pair.between:
            if end not in names | regions:
                raise InputError(
                    source,
                    field,
                    f"there is no offer or region {end!r}",
                    f"name two of {', '.join(sorted(names | regions))}",
                )
        if len(set(pair.between) & names) == 1 and set(pair.between) & regions:
            raise InputError(
                source, field, "joins an offer to a region", "name two offers or two regions (or one twice)"
            )
        if frozenset(pair.between) in seen:
            raise InputError(
                source, field, f"{' and '.join(pair.between)} are linked twice", "keep one of the entries"
            )
        seen.add(frozenset(pair.between))
    for a, first in enumerate(offers.offers):
        for b in range(a, len(offers.offers)):
            if (a != b or first.available > 1) and offers.figures(a, b) is None:
                raise InputError(
                    source,
                    "network",
                    f"nothing joins {first.name!r} and {offers.offers[b].name!r}",
                    "add network.default or a link between them",
                )
