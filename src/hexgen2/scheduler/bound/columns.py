"""Columns of the linear program over groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """Groups: GPUs by kind ``cells`` (V, K), and requests/s ``rates`` (V,).

    ``halves`` (V, K): 2 for each stage that takes more than half of a node, 1 for one that takes half.
    ``beside`` (V, K): the GPUs without those of stages that fill whole nodes.
    """

    cells: FloatArray
    rates: FloatArray
    halves: FloatArray
    beside: FloatArray

    def rows(self, index: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Columns:
        """Some of the groups."""
        return Columns(self.cells[index], self.rates[index], self.halves[index], self.beside[index])
