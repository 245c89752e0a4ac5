"""How many bytes of request bodies are in memory, so that a flood of large ones cannot fill it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hexgen2.coordinator.errors import bodies_full


class Held:
    """One body's part."""

    def __init__(self, bodies: Bodies, size: int) -> None:
        self._bodies = bodies
        self._size = 0
        self.resize(size)

    def resize(self, size: int) -> None:
        """Its true size, once that is known."""
        self._bodies.bytes += size - self._size
        self._size = size


class Bodies:
    """Counts bodies from before they are read until their requests end."""

    def __init__(self, limit_bytes: int, largest_bytes: int) -> None:
        self._limit = limit_bytes
        self._largest = largest_bytes
        self.bytes = 0

    @contextmanager
    def held(self, announced_bytes: int | None) -> Iterator[Held]:
        """Count a body inside the block; ApiError (503) where there is no room for it.

        One without an announced size counts as the largest until it is read.
        """
        size = self._largest if announced_bytes is None else min(announced_bytes, self._largest)
        if self.bytes and self.bytes + size > self._limit:
            raise bodies_full()
        held = Held(self, size)
        try:
            yield held
        finally:
            held.resize(0)
