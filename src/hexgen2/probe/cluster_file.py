"""A probe's result as a cluster file that a person can read and correct."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from hexgen2.probe.found import Found

_WIDTH = 110


def document_text(document: Mapping[str, Any]) -> str:
    """The YAML of a cluster's document, a node and a link on each line."""
    network = document.get("network", {})
    lines = [f"name: {flow(document['name'])}"]
    for key in ("gpu_types", "nodes"):
        if document.get(key):
            lines += [f"{key}:", *(f"  - {flow(entry)}" for entry in document[key])]
    lines.append("network:" if any(network.values()) else "network: {}")
    if network.get("default"):
        lines.append(f"  default: {flow(network['default'])}")
    if network.get("links"):
        ordered = ({"between": link["between"], **link} for link in network["links"])
        lines += ["  links:", *(f"    - {flow(link)}" for link in ordered)]
    return "\n".join(lines) + "\n"


def cluster_text(found: Found, when: datetime.datetime, version: str) -> str:
    """The YAML of a cluster file; every remark stands as a comment above what it is about."""
    lines = [
        f"# Probed on {when:%Y-%m-%d %H:%M %Z} by `hexgen2 probe` (HexGen-2 {version}).",
        "# Correct what you know better.",
        *_comments(found.remarks, ""),
        f"name: {flow(found.name)}",
    ]
    if found.types:
        lines.append("gpu_types:")
        for kind in found.types:
            lines += [*_comments(kind.remarks, "  "), *_entry(kind.fields)]
    lines.append("nodes:")
    for node in found.nodes:
        lines += [*_comments(node.remarks, "  "), f"  - {flow(dict(node.fields))}"]
    if found.link:
        lines += ["network:", *_comments(found.link_remarks, "  "), f"  default: {flow(dict(found.link))}"]
    if found.links:
        lines += ["network:", "  links:"]
        for link in found.links:
            lines += [*_comments(link.remarks, "    "), f"    - {flow(dict(link.fields))}"]
    return "\n".join(lines) + "\n"


def _entry(fields: Mapping[str, Any]) -> list[str]:
    """A list item with a field on each line."""
    lines = [f"{key}: {flow(value)}" for key, value in fields.items()]
    return [f"  - {lines[0]}", *(f"    {line}" for line in lines[1:])]


def flow(value: Any) -> str:
    """A value on one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _comments(remarks: Iterable[str], indent: str) -> list[str]:
    """Remarks as comment lines, broken between words."""
    lines = []
    for remark in remarks:
        line = f"{indent}#"
        for word in remark.split():
            if len(line) + len(word) >= _WIDTH:
                lines.append(line)
                line = f"{indent}#"
            line += f" {word}"
        lines.append(line)
    return lines
