"""What the bound hands back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hexgen2.scheduler.solution import Cell


@dataclass(frozen=True)
class Bound:
    """``value``: requests/s that no plan exceeds. ``starts``: groups that would serve about as much if the
    bound were exact, for the search to begin at."""

    value: float
    starts: tuple[tuple[Cell, ...], ...] = ()

    def at_most(self, value: float) -> Bound:
        """The same with the lower of two values."""
        return replace(self, value=min(self.value, value))
