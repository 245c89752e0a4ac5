"""Rows of stage counts: what groups are made of, apart from the order of their stages and their layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.bound.places import Places

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Slot = tuple[int, int]
"""(place, GPUs of a stage on one of its nodes)"""


@dataclass(frozen=True)
class Stages:
    """``counts[v, q]``: how many stages of slot q group v has. Slots are sorted by place."""

    places: Places
    slots: tuple[Slot, ...]
    counts: IntArray

    def __len__(self) -> int:
        return len(self.counts)

    def rows(self, index: IntArray | BoolArray | slice) -> Stages:
        """Some of the groups."""
        return Stages(self.places, self.slots, self.counts[index])

    @cached_property
    def total(self) -> IntArray:
        """(V,) stages."""
        total: IntArray = self.counts.sum(axis=1)
        return total

    @cached_property
    def by_slot(self) -> IntArray:
        """(Q, V) the counts, slots first."""
        return np.ascontiguousarray(self.counts.T)

    @cached_property
    def absent(self) -> BoolArray:
        """(Q, V) whether a group lacks a slot."""
        absent: BoolArray = self.by_slot == 0
        return absent

    @cached_property
    def gpus(self) -> IntArray:
        """(V, K) GPUs by place."""
        by_place = np.zeros((len(self.slots), len(self.places)), dtype=np.int64)
        for row, (place, tp) in enumerate(self.slots):
            by_place[row, place] = tp
        gpus: IntArray = self.counts @ by_place
        return gpus

    @cached_property
    def starts(self) -> IntArray:
        """(used places,) the first slot of each place that has any."""
        places = [place for place, _ in self.slots]
        return np.array([at for at, place in enumerate(places) if place not in places[:at]], dtype=np.int64)

    @cached_property
    def entries(self) -> IntArray:
        """(used places, V) stages that are the first on their node, at least; 0 in groups on a single node."""
        nodes = -(-self.gpus // np.array(self.places.width))
        nodes = np.where(nodes.sum(axis=1, keepdims=True) <= 1, 0, nodes)
        used = [self.slots[at][0] for at in self.starts]
        entries: IntArray = np.ascontiguousarray(nodes[:, used].T)
        return entries
