"""What a probe found: nodes and types as the cluster file has them, each with how it was found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FoundNode:
    """``fields`` as in the cluster file; ``remarks`` in words."""

    fields: Mapping[str, Any]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundType:
    """A GPU type that the catalog does not have (``fields`` as under gpu_types)."""

    fields: Mapping[str, Any]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundLink:
    """``fields`` as under network.links."""

    fields: Mapping[str, Any]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A machine or a cluster of them. ``link``: between its nodes, as under network.default; None where it is
    one node, or where ``links`` join all of them."""

    name: str
    nodes: tuple[FoundNode, ...]
    types: tuple[FoundType, ...] = ()
    link: Mapping[str, float] | None = None
    link_remarks: tuple[str, ...] = ()
    remarks: tuple[str, ...] = field(default=())
    links: tuple[FoundLink, ...] = ()

    def document(self) -> dict[str, Any]:
        """The cluster document, without the remarks."""
        document: dict[str, Any] = {"name": self.name}
        if self.types:
            document["gpu_types"] = [dict(kind.fields) for kind in self.types]
        document["nodes"] = [dict(node.fields) for node in self.nodes]
        if self.link:
            document["network"] = {"default": dict(self.link)}
        if self.links:
            document["network"] = {"links": [dict(link.fields) for link in self.links]}
        return document
