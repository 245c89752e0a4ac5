"""The linear program over groups: GPUs of each kind, balance of the phases, links and NICs between kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from hexgen2.scheduler.bound.columns import Columns
from hexgen2.scheduler.bound.exchange import Exchange
from hexgen2.scheduler.bound.long import LongPipelines
from hexgen2.specs.plan import Role

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """The program's duals: (K,) the price of a GPU in each role, less what it may exchange, of half a node as
    stages take it up, what a GPU may exchange inside its node, and what one request/s of a group is worth."""

    gpu: dict[Role, FloatArray]
    half: FloatArray
    beside: dict[Role, FloatArray]
    rate: dict[Role, float]

    def excess(self, role: Role, columns: Columns) -> tuple[FloatArray, FloatArray]:
        """(V,) what groups are worth beyond their price, and their price without what they may exchange."""
        halves = columns.halves @ self.half
        worth = columns.rates * self.rate[role] + columns.beside @ self.beside[role]
        excess: FloatArray = worth - columns.cells @ self.gpu[role] - halves
        return excess, columns.cells @ self.gpu["colocated"] + halves


class Program:
    """max Σ decoded + colocated. Variables: groups; prefilled and decoded on a kind; sent from kind to kind
    over the network; left on its node.

    Rows, all ≤, with K kinds: GPUs of a kind within what there is (K); prefilled on a kind within what its GPUs
    contribute (K), and in all within the groups' rates (1); decoded likewise (K + 1); sent from a kind within
    what is prefilled there (K); decoded within what is received (K); NICs out (K) and in (K); stages that take
    half of a node, or more, within what nodes hold of these (K); what stays on a node within what is
    prefilled (K) and decoded (K) by stages that leave room on their nodes; memory of long pipelines.
    """

    def __init__(self, exchange: Exchange, long: Sequence[LongPipelines]) -> None:
        self.exchange = exchange
        kinds = self.kinds = len(exchange.places)
        self.scale = float(max(exchange.decode_gpu.max(), exchange.prefill_gpu.max(), 1e-300))
        self._given, self._taken = kinds, 2 * kinds + 1
        self._sent, self._got, self._out, self._in, self._halves = (
            3 * kinds + 2 + kinds * at for at in range(5)
        )
        self._given_beside, self._taken_beside, self._memory = (8 * kinds + 2 + kinds * at for at in range(3))
        self.rows = self._memory + sum(part.levels for part in long)
        self._columns: list[FloatArray] = []
        self._goals: list[FloatArray] = []
        self._bounds: list[FloatArray] = []
        self._exchange()
        row = self._memory
        for part in long:
            scales = np.maximum(np.abs(part.memory).max(axis=1, initial=0.0, keepdims=True), 1.0)
            self.add(part.role, part.columns, part.memory / scales, row)
            row += part.levels

    def add(self, role: Role, groups: Columns, memory: FloatArray | None = None, row: int = 0) -> None:
        """Columns for groups, and their rows of memory (M, V) from ``row`` on."""
        cells, rates = groups.cells, groups.rates
        if not len(rates):
            return
        block, goal = np.zeros((self.rows, len(rates))), np.zeros(len(rates))
        block[: self.kinds] = cells.T
        block[self._halves : self._halves + self.kinds] = groups.halves.T / 2
        if memory is not None:
            block[row : row + len(memory)] = memory
        if role == "colocated":
            goal = rates / self.scale
        else:
            start, beside, per_gpu = self._phase(role)
            block[start : start + self.kinds] = -(cells * per_gpu).T / self.scale
            block[start + self.kinds] = -rates / self.scale
            block[beside : beside + self.kinds] = -(groups.beside * per_gpu).T / self.scale
        self._take(block, goal, np.full(len(rates), np.inf))

    def solve(self) -> tuple[float, Prices]:
        """The optimum in requests/s, and its prices."""
        limits = np.zeros(self.rows)
        limits[: self.kinds] = self.exchange.places.room
        limits[self._halves : self._halves + self.kinds] = [len(nodes) for nodes in self.exchange.places.nodes]
        for start in (self._out, self._in):
            limits[start : start + self.kinds] = self.exchange.nic / self.scale
        finite = np.isfinite(limits)
        most = np.concatenate(self._bounds)
        solved = linprog(
            -np.concatenate(self._goals),
            A_ub=csr_matrix(np.concatenate(self._columns, axis=1)[finite]),
            b_ub=limits[finite],
            bounds=np.stack([np.zeros(len(most)), most], axis=1),
            method="highs",
        )
        assert solved.status == 0, f"the bound's program ended with: {solved.message}"
        duals = np.zeros(self.rows)
        duals[finite] = np.maximum(-np.asarray(solved.ineqlin.marginals), 0.0)
        # The solver's feasibility tolerance is 1e-7 of each row, and these are of the order of 1.
        return -float(solved.fun) * self.scale * (1 + 1e-6), self._prices(duals)

    def _prices(self, duals: FloatArray) -> Prices:
        gpu: dict[Role, FloatArray] = {"colocated": duals[: self.kinds]}
        rate: dict[Role, float] = {"colocated": 1 / self.scale}
        beside: dict[Role, FloatArray] = {"colocated": np.zeros(self.kinds)}
        phases: tuple[Role, Role] = ("prefill", "decode")
        for role in phases:
            start, row, per_gpu = self._phase(role)
            gpu[role] = duals[: self.kinds] - duals[start : start + self.kinds] * per_gpu / self.scale
            rate[role] = float(duals[start + self.kinds]) / self.scale
            beside[role] = duals[row : row + self.kinds] * per_gpu / self.scale
        return Prices(gpu, duals[self._halves : self._halves + self.kinds] / 2, beside, rate)

    def _phase(self, role: Role) -> tuple[int, int, FloatArray]:
        """The first rows of a phase, in all and beside others, and what a GPU of each kind adds to it (K,)."""
        if role == "prefill":
            return self._given, self._given_beside, self.exchange.prefill_gpu
        return self._taken, self._taken_beside, self.exchange.decode_gpu

    def _exchange(self) -> None:
        """The variables of the phases and the network."""
        kinds, each = self.kinds, np.eye(self.kinds)
        for start, other in ((self._given, self._sent), (self._taken, self._got)):
            block, goal = np.zeros((self.rows, kinds)), np.zeros(kinds)
            block[start : start + kinds] = each
            block[start + kinds] = 1.0
            if start == self._given:
                block[other : other + kinds] = -each
            else:
                block[other : other + kinds] = each
                goal = np.ones(kinds)
            self._take(block, goal, np.full(kinds, np.inf))
        block = np.zeros((self.rows, kinds * kinds))
        for a in range(kinds):
            for b in range(kinds):
                at = a * kinds + b
                block[self._sent + a, at] = 1.0
                block[self._got + b, at] = -1.0
                block[self._out + a, at] = block[self._in + b, at] = 1.0
        self._take(block, np.zeros(kinds * kinds), self.exchange.link.ravel() / self.scale)
        block = np.zeros((self.rows, kinds))  # what stays on its node
        for start, sign in (
            (self._sent, 1.0),
            (self._got, -1.0),
            (self._given_beside, 1.0),
            (self._taken_beside, 1.0),
        ):
            block[start : start + kinds] = sign * each
        self._take(block, np.zeros(kinds), np.full(kinds, np.inf))

    def _take(self, block: FloatArray, goal: FloatArray, most: FloatArray) -> None:
        self._columns.append(block)
        self._goals.append(goal)
        self._bounds.append(most)
