"""How many requests per second can move from prefill to decode GPUs, by cuts of the network (docs/bound.md)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hexgen2.scheduler.bound.groups import tp_sizes
from hexgen2.scheduler.bound.places import Places
from hexgen2.scheduler.bound.rates import GroupRates
from hexgen2.scheduler.problem import Problem
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
MOST_CUT = 7
"""Nodes up to which every cut is looked at; beyond it those that part off one node."""


class Exchange:
    """The flow between the GPUs of nodes, bounded by what these contribute and by links and NICs.

    ``free``: links and NICs limit nothing, to tell what they are worth.
    """

    def __init__(self, problem: Problem, places: Places, *, free: bool = False) -> None:
        self.problem, self.places, self.free = problem, places, free
        self.kv_bytes = problem.cost.moments(problem.lengths).input * problem.model.kv_bytes_per_token

    def most(self, giving: IntArray, taking: IntArray) -> FloatArray:
        """(M,) requests/s at most from GPUs ``giving`` (M, K) to GPUs ``taking`` (M, K)."""
        taken = taking * self.decode_gpu
        given = np.minimum(giving * self.prefill_gpu, taken + self.nic)  # a node keeps no more than it takes
        present = (giving > 0).astype(float)
        least: FloatArray = np.minimum(given.sum(axis=1), taken.sum(axis=1))
        for reached in self._cuts if not self.free else ():
            into = np.minimum(present @ (self.link * reached[:, None]), self.nic)
            into[:, reached] = np.inf
            least = np.minimum(least, given @ ~reached + np.minimum(taken, into).sum(axis=1))
        return least

    @cached_property
    def link(self) -> FloatArray:
        """(K, K) requests' KV caches per second over all links from nodes of a place to nodes of a place."""
        bandwidth = self.places.topology.bandwidth.copy()
        np.fill_diagonal(bandwidth, 0.0)
        count = len(self.places)
        carried = np.zeros((count, count))
        for a, first in enumerate(self.places.nodes):
            for b, second in enumerate(self.places.nodes):
                whole = np.inf if self.free else bandwidth[np.ix_(first, second)].sum()
                carried[a, b] = whole / self.kv_bytes
        return carried

    @cached_property
    def nic(self) -> FloatArray:
        """(K,) requests' KV caches per second through all NICs of a place."""
        if self.free:
            return np.full(len(self.places), np.inf)
        cluster = self.places.topology.cluster
        whole = [sum(cluster.nic_bandwidth(node) for node in nodes) for nodes in self.places.nodes]
        return np.array(whole) / self.kv_bytes

    @cached_property
    def _cuts(self) -> list[NDArray[np.bool_]]:
        """(K,) each: the places on the senders' side."""
        count = len(self.places)
        if count <= MOST_CUT:
            return [np.array([bool(number >> at & 1) for at in range(count)]) for number in range(2**count)]
        one = [np.arange(count) == at for at in range(count)]
        return [np.zeros(count, dtype=bool), np.ones(count, dtype=bool), *one, *(~cut for cut in one)]

    @cached_property
    def prefill_gpu(self) -> FloatArray:
        """(K,) requests/s that one GPU contributes to prefill at most."""
        return self._by_place("prefill", self.problem.engine.prefill_pp)

    @cached_property
    def decode_gpu(self) -> FloatArray:
        """(K,) requests/s that one GPU contributes to decoding at most."""
        return self._by_place("decode", self.problem.engine.decode_pp)

    def _by_place(self, role: Role, pipelines: bool) -> FloatArray:
        rates = GroupRates(self.problem, self.places, role)
        found = []
        for place in range(len(self.places)):
            most = max(self._alone(rates, place, tp) for tp in self._sizes)
            found.append(max(most, self._contributed(rates, place)) if pipelines else most)
        return np.array(found)

    @property
    def _sizes(self) -> list[int]:
        return tp_sizes(self.problem, self.places)

    def _alone(self, rates: GroupRates, place: int, tp: int) -> float:
        """Requests/s per GPU of one-stage groups with GPUs of a place: none is faster than among its own kind.

        Beyond ``kv_shards`` GPUs several hold the same heads, and one of them may send all of these.
        """
        gpu, most = self.places.types[place], 0.0
        if tp <= self.places.width[place]:
            most = rates.one_stage(gpu, tp, self.places.inside[place]) / tp
        if tp > 1:
            parts = min(tp, self.problem.model.kv_shards)
            for link in {link for link in self.places.between[place] if link is not None}:
                most = max(most, rates.one_stage(gpu, tp, link) / parts)
        return most

    def _contributed(self, rates: GroupRates, place: int) -> float:
        """Requests/s per GPU of stages in pipelines."""
        sizes = [tp for tp in self._sizes if tp <= self.places.width[place]]
        return max((rates.contribution((place, tp)) / tp for tp in sizes), default=0.0)
