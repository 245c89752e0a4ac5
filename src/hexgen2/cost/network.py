"""Time on the links inside a replica: all-reduces of a TP group and hidden states between stages."""

from __future__ import annotations

from hexgen2.specs.gpu import Link


def allreduce_s(size_bytes: float, tp: int, link: Link | None, hops: float | None = None) -> float:
    """Ring all-reduce of ``size_bytes`` over ``tp`` GPUs: 2·(t−1)/t·x/β + 2·(t−1)·α; 0 with one GPU.

    ``hops``: the most latencies α it takes, where GPUs talk to all others at once in place of a ring.

    Example: 1 MB over 4 GPUs at 100 GB/s and 5 µs: 2·¾·10 µs + 6·5 µs = 45 µs.
    """
    if tp == 1 or link is None:
        return 0.0
    latencies = 2 * (tp - 1) if hops is None else min(2 * (tp - 1), hops)
    return 2 * (tp - 1) / tp * size_bytes / link.bandwidth + latencies * link.latency


def allgather_s(size_bytes: float, tp: int, link: Link | None, hops: float | None = None) -> float:
    """Ring all-gather to a whole of ``size_bytes`` on each of ``tp`` GPUs: (t−1)/t·x/β + (t−1)·α."""
    return allreduce_s(size_bytes, tp, link, hops) / 2


def boundary_s(size_bytes: float, link: Link | None) -> float:
    """Sending hidden states of ``size_bytes`` from one stage to the next: α + x/β; 0 without a stage before."""
    return 0.0 if link is None else link.seconds(size_bytes)
