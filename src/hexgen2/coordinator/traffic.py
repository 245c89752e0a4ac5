"""What the coordinator tells of its requests while they come and go: lengths and times, never text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hexgen2.specs.routing import Path


@dataclass(frozen=True, slots=True)
class Served:
    """A request that was answered: its last path, and the tokens that it read and wrote."""

    path: Path
    prompt_tokens: int
    output_tokens: int


class Listener(Protocol):
    """Whoever wants to know. Called within the event loop, so it must be quick."""

    def arrived(self) -> None:
        """A generation request came; it may yet be refused."""
        ...

    def served(self, request: Served) -> None:
        """A request was answered whole."""
        ...
