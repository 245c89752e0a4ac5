"""METIS as another first partition of the GPUs (`--init metis`; the optional package pymetis)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from hexgen2.specs.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
STEPS = 10_000
"""METIS takes whole numbers: the largest weight becomes this, and no edge less than 1."""


def check_installed() -> None:
    """Raise InputError when pymetis is missing."""
    if find_spec("pymetis") is None:
        raise InputError(
            "--init",
            "",
            "metis needs the package pymetis, which is not installed",
            "pip install 'hexgen2[metis]', or leave out --init",
        )


def metis_groups(count: int, weights: FloatArray, memory: FloatArray) -> list[IntArray]:
    """At most ``count`` groups of vertices with balanced memory and the least edge weight cut.

    ``weights`` (n, n): edges with a zero diagonal; ``memory`` (n,): vertices. The result depends on the
    arguments alone.
    """
    if count <= 1 or len(memory) == 1:
        return [np.arange(len(memory))]
    pymetis = import_module("pymetis")
    row, column = np.nonzero(weights)
    starts = np.searchsorted(row, np.arange(len(memory) + 1))
    part = pymetis.part_graph(
        count,
        pymetis.CSRAdjacency(starts, column),
        vweights=_whole(memory),
        eweights=_whole(weights[row, column]),
        recursive=True,
        options=pymetis.Options(seed=0),
    ).vertex_part
    label = np.asarray(part, dtype=np.int64)
    return [np.flatnonzero(label == group) for group in np.unique(label)]


def _whole(values: FloatArray) -> IntArray:
    """The values as whole numbers from 1 to `STEPS`."""
    scaled: IntArray = np.maximum(1, np.rint(values / values.max() * STEPS)).astype(np.int64)
    return scaled
