"""Names that other systems accept, and placeholders for what is known only where a process starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from hexgen2.specs.errors import InputError

OWN_ADDRESS = "<own-address>"
"""The IP address of the machine or pod that a process runs on."""

NODE_RANK = "<node-rank>"
"""A process's rank in its group."""

_PLACEHOLDERS = re.compile(f"({re.escape(OWN_ADDRESS)}|{re.escape(NODE_RANK)})")
_NOT_LABEL = re.compile(r"[^a-z0-9]+")
LONGEST_LABEL = 28
"""DNS labels have 63 characters at most; two of ours and a suffix must fit."""


def render(text: str, literal: Callable[[str], str], references: dict[str, str]) -> str:
    """``text`` with its placeholders replaced by ``references`` and everything else through ``literal``, which
    quotes or escapes it.

    >>> render("tcp://<own-address>:1$", lambda part: part.replace("$", "$$"), {OWN_ADDRESS: "$(IP)"})
    'tcp://$(IP):1$$'
    """
    parts = _PLACEHOLDERS.split(text)
    return "".join(references[part] if part in references else literal(part) for part in parts if part)


def dns_label(text: str) -> str:
    """A DNS label made of a name: lower case, digits and hyphens, a letter first.

    >>> dns_label("Node A_1"), dns_label("8xh100")
    ('node-a-1', 'n8xh100')
    """
    label = _NOT_LABEL.sub("-", text.lower()).strip("-")
    return (label if label[:1].isalpha() else f"n{label}")[:LONGEST_LABEL].rstrip("-")


def dns_labels(names: Iterable[str], source: str, what: str) -> dict[str, str]:
    """A DNS label for each name; InputError where two names come out alike."""
    labels: dict[str, str] = {}
    for name in names:
        label = dns_label(name)
        if other := next((known for known, used in labels.items() if used == label and known != name), None):
            raise InputError(
                source, what, f"{other!r} and {name!r} both become {label!r}", "rename one of them"
            )
        labels[name] = label
    return labels
