"""The rate that a group carries while enough of its requests meet their latency targets.

Throughput loads a group to 100%, where waits have no end. Here requests come as a Poisson process, wait, and
the rate is the highest at which the stated part of them meets the targets (`ATTAINMENT`). What a group of each
role waits for is in `cost.queues`; docs/cost-model.md compares the figures with the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10, sqrt

from hexgen2.cost.capacity import ColocatedCapacity, DecodeCapacity
from hexgen2.cost.memory import Settings
from hexgen2.cost.moments import Moments
from hexgen2.cost.queues import NOTHING, After, PromptQueue, answer_queue, shared_queue
from hexgen2.cost.stage import StageCost

ATTAINMENT = 0.9
"""Part of the requests that must meet both targets: the SLO attainment at which DistServe (OSDI '24) and the
HexGen papers report goodput."""
PHASE_ATTAINMENT = sqrt(ATTAINMENT)
"""Of a disaggregated request two groups each must do their part; their waits are taken as independent."""
DEFAULT_TTFT_S = 2.0
DEFAULT_TPOT_S = 0.2
"""Targets where none are given: those of MLPerf Inference (server, Llama 2 70B, from v4.0 on), 200 ms a token
being a little faster than people read."""
LINK_LOAD = 0.6
"""Load up to which links and NICs are planned: beyond, caches queue (at 0.6 a transfer takes 2.5 times as
long)."""
TOLERANCE = 2e-3
LOWEST = 1e-3
"""Part of a group's throughput below which a rate counts as none."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency targets in seconds that a request must meet both."""

    ttft_s: float = DEFAULT_TTFT_S
    tpot_s: float = DEFAULT_TPOT_S


def prefill_goodput(
    queue: PromptQueue, most: float, ttft_s: float, after: After = NOTHING, above: float = 0.0
) -> float:
    """Requests/s of a prefill group, up to ``most``, `PHASE_ATTAINMENT` of which have their first token in
    time.

    TTFT = wait for the batch under way + own batch + ``after`` (KV transfer and first decode step). 0 where the
    rate is not higher than ``above``.
    """
    return _highest(lambda rate: queue.met(rate, ttft_s, after), PHASE_ATTAINMENT, most, above)


def steps_to_token(settings: Settings) -> float:
    """Steps of a decode group between the end of a prefill and the first token, beside the transfer: the rest
    of the step under way, half of one in the mean, and the one that gives the token.

    An engine that fetches between two steps asks for the cache after that rest, and takes the sequence in at
    the end of the step in which the cache arrives: one more (half of one for a transfer of several steps).
    """
    return 2.5 if settings.fetch_between_steps else 1.5


def handover(transfer_s: float, tokens: float, tpot_s: float, settings: Settings) -> After:
    """What follows the prefill on a route whose most loaded resource one request of ``tokens`` tokens keeps
    busy for ``transfer_s``, into a decode group with steps of ``tpot_s``.

    Links are planned to be loaded to `LINK_LOAD`; transfers share them fairly, so each takes 1/(1 − load) times
    as long as alone (M/G/1 processor sharing). Then `steps_to_token`. Rounded up to two digits, so that alike
    routes are worked out once.
    """
    per_token = transfer_s / tokens / (1 - LINK_LOAD)
    return After(_rounded_up(steps_to_token(settings) * tpot_s), _rounded_up(per_token))


def _rounded_up(value: float) -> float:
    if value <= 0:
        return 0.0
    unit = 10.0 ** (floor(log10(value)) - 1)
    return ceil(value / unit) * unit


def decode_goodput(
    capacity: DecodeCapacity, costs: Sequence[StageCost], moments: Moments, above: float = 0.0
) -> float:
    """Requests/s of a decode group at which `PHASE_ATTAINMENT` of the requests find a place at once.

    ``capacity`` is that under the TPOT target: its ``max_batch`` keeps all that have a place within it.
    """
    if capacity.rps <= 0:
        return 0.0
    queue = answer_queue(costs, moments, capacity.max_batch)
    return _highest(lambda rate: 1 - queue.full(rate), PHASE_ATTAINMENT, capacity.rps, above)


def colocated_goodput(
    capacity: ColocatedCapacity,
    costs: Sequence[StageCost],
    moments: Moments,
    settings: Settings,
    targets: Targets,
    above: float = 0.0,
) -> float:
    """Requests/s of a colocated group, `ATTAINMENT` of which meet both targets."""
    if capacity.rps <= 0:
        return 0.0
    queue = shared_queue(costs, moments, capacity.max_batch, capacity.rps / 2, settings)

    def met(rate: float) -> float:
        return queue.met(rate, targets.ttft_s, targets.tpot_s, ATTAINMENT)

    return _highest(met, ATTAINMENT, capacity.rps, above)


def _highest(met: Callable[[float], float], needed: float, most: float, above: float) -> float:
    """The highest rate up to ``most`` at which ``met`` is at least ``needed``; 0 where it is not above
    ``above``.

    ``met`` falls with the rate, or (a lone prompt in a pipeline of a colocated group has no other to share its
    time with) is lowest at hardly any load: a group that misses the targets then counts as missing them.
    """
    low, high = max(above, LOWEST * most), most
    if most <= above or met(LOWEST * most) < needed or met(low) < needed:
        return 0.0
    if met(most) >= needed:
        return most
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        if met(middle) >= needed:
            low = middle
        else:
            high = middle
    return low
