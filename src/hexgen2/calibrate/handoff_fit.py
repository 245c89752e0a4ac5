"""What a hand-over costs an engine, as a fixed time and a time per byte: least squares, none below zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from hexgen2.calibrate.fit import Fit, FloatArray, Interval
from hexgen2.calibrate.handoff import SEQUENCES, SHORT, Handed, Handoffs
from hexgen2.cost import CostModel, Layout

RESAMPLES = 200
"""Draws of the repeats from which the confidence intervals come (bootstrap)."""

LEAST_S = 1e-3
"""What errors are relative to where less was measured."""

Values = Sequence[Sequence[float]]
"""Seconds by prompt length and repeat."""


def with_handoffs(fit: Fit, cost: CostModel, handoffs: Sequence[Handoffs]) -> Fit:
    """The fit and what hand-overs cost its GPU type; ``cost`` has the fit's efficiencies.

    The overhead is what a cache of no tokens costs. With all caches of one length only the time per byte is
    found, with none nothing.
    """

    def joining_s(one: Handed) -> float:
        """What the sequence itself, which joins for one step, adds to that step."""
        context = SEQUENCES * SHORT
        alone = cost.decode_step_seconds(one.layout, SEQUENCES, context)
        return cost.decode_step_seconds(one.layout, SEQUENCES + 1, context + one.tokens) - alone

    received = [one for each in handoffs for one in each.received]
    sent = [one for each in handoffs for one in each.sent]
    lost = [[seconds - joining_s(one) for seconds in one.lost_s] for one in received]
    fit = _with(fit, cost, "handoff", ("handoff_overhead_s", "handoff_byte_s"), received, lost)
    waits = [list(one.wait_s) for one in received]
    fit = _with(fit, cost, "handoff wait", ("handoff_wait_s", "handoff_wait_byte_s"), received, waits)
    busy = [list(one.lost_s) for one in sent]
    return _with(fit, cost, "send", ("send_overhead_s", "send_byte_s"), sent, busy)


def _with(
    fit: Fit, cost: CostModel, phase: str, names: tuple[str, str], points: Sequence[Handed], values: Values
) -> Fit:
    if not points:
        return fit
    sizes = np.array([one.tokens * token_bytes(cost, one.layout) for one in points])
    matrix = np.column_stack((np.full(len(sizes), float(len(set(sizes)) > 1)), sizes))
    found = _line(matrix, values)
    rng = np.random.default_rng(0)
    resampled = [[rng.choice(each, len(each)).tolist() for each in values] for _ in range(RESAMPLES)]
    drawn = np.array([_line(matrix, draw) for draw in resampled])
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    intervals = {
        name: Interval(float(found[place]), float(low[place]), float(high[place]))
        for place, name in enumerate(names)
    }
    middles = np.array([np.median(each) for each in values])
    errors = np.abs(matrix @ found - middles) / np.maximum(np.abs(middles), LEAST_S)
    return replace(
        fit,
        efficiency=fit.efficiency.model_copy(update={name: one.value for name, one in intervals.items()}),
        intervals={**fit.intervals, **intervals},
        apart={**fit.apart, phase: float(np.median(errors))},
    )


def token_bytes(cost: CostModel, layout: Layout) -> float:
    """Bytes of a token's KV cache on a GPU of the stage that has most of them."""
    model = cost.model
    return max(
        stage.layers * model.kv_bytes_per_token_layer / min(stage.tp, model.kv_shards) for stage in layout
    )


def _line(matrix: FloatArray, values: Values) -> FloatArray:
    """(seconds per cache, seconds per byte), neither below zero, of the medians of each length."""
    scale = np.maximum(matrix.max(axis=0), 1.0)
    found, _ = nnls(matrix / scale, np.array([np.median(each) for each in values]))
    return np.asarray(found / scale)
