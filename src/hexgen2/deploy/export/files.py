"""What an export is: texts by their names, and what the reader should know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from typing_extensions import override

from hexgen2 import __version__
from hexgen2.specs.plan import Plan


@dataclass(frozen=True)
class File:
    """A text file and its permissions."""

    text: str
    mode: int = 0o644


@dataclass(frozen=True)
class Export:
    """Files by their path below the export's directory, and notes in words."""

    files: Mapping[str, File]
    notes: tuple[str, ...] = ()


def origin(plan: Plan, target: str) -> tuple[str, ...]:
    """The lines that say where a file is from."""
    roles = [(len(plan.role_groups(role)), role) for role in ("prefill", "decode", "colocated")]
    groups = ", ".join(f"{count} {role}" for count, role in roles if count)
    return (
        f"{plan.model} on cluster {plan.cluster.name}: serving groups {groups}.",
        f"Written by `hexgen2 export --to {target}` (HexGen-2 {__version__}); export again rather than edit.",
    )


def yaml_text(documents: Iterable[Mapping[str, Any]], heading: Iterable[str]) -> str:
    """YAML documents one after the other, under a heading as a comment."""
    comment = "".join(f"# {line}\n" for line in heading)
    return comment + yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True, explicit_start=True
    )


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, everything spelt out (no anchors)."""

    @override
    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
