"""What transfers cost engines that compute meanwhile, and what computing costs the transfers.

    python benchmarks/kv_beside.py [--mib 64] [--seconds 2] [--repeat 4] [--transports tcp]

A prefill and a decode worker with the real connector, in processes of their own, both computing without a pause
on the thread that would be vLLM's: steps of many short operations, as the layers of a small model are. In every
other phase the decode worker fetches one cache after the other beside it, each as soon as a step finds the one
before to be there. Told are each side's steps per second without and with transfers, the time lost to a
gigabyte moved, the rate of the reads, and the time from an order to the first step that knows that all is
there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from kv_transfer import BLOCK_BYTES, BLOCK_TOKENS, LAYERS, MIB, cache_worker, processes, reading_worker

from hexgen2.specs.ucx import set_ucx_defaults

OPERATIONS, ELEMENTS = 40, 1 << 15
"""Of a step: about a millisecond."""


def compute(numbers: np.ndarray) -> None:
    """One step of the model: each operation lets go of Python's lock while it computes."""
    for _ in range(OPERATIONS):
        np.sqrt(numbers, out=numbers)
        numbers += 1.0


def _prefill(pipe: Connection, blocks: int) -> None:
    from hexgen2.vllm_plugin.kv_connector.leases import LeaseOrder

    worker, arrays = cache_worker(1, 0, blocks)
    worker.take([LeaseOrder(1, "request", 600.0)], [])  # held throughout: one cache is read again and again
    pipe.send((worker.address.host, worker.address.port, worker.address.incarnation))
    numbers = np.ones(ELEMENTS, dtype=np.float32)
    while (seconds := pipe.recv()) is not None:
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            compute(numbers)
            worker.take_ended()
            steps += 1
        pipe.send(steps / (time.perf_counter() - begin))
    worker.close()
    del arrays


def _decode(pipe: Connection, blocks: int) -> None:
    from hexgen2.vllm_plugin.kv_connector.loader import LoadOrder
    from hexgen2.vllm_plugin.kv_connector.params import VERSION, Offer

    with reading_worker(pipe, blocks) as (worker, workers):
        tokens = blocks * BLOCK_TOKENS
        there = tuple(np.random.default_rng(0).permutation(blocks).tolist())
        offer = Offer(VERSION, "prefill", 1, 600.0, tokens, BLOCK_TOKENS, there, workers)
        numbers = np.ones(ELEMENTS, dtype=np.float32)
        while (order := pipe.recv()) is not None:
            seconds, moving = order
            begin, steps, loads = time.perf_counter(), 0, 0
            ordered, waits, busy = 0.0, [], False
            while (now := time.perf_counter()) - begin < seconds or busy:
                if moving and not busy and now - begin < seconds:
                    loads, ordered, busy = loads + 1, now, True
                    mine = tuple(range(blocks))
                    worker.take([], [LoadOrder(f"request{loads}", offer, 0, tokens, mine, BLOCK_TOKENS)])
                compute(numbers)
                ended = worker.take_ended()
                assert not ended.failed, "a transfer failed"
                if ended.received:
                    waits.append(time.perf_counter() - ordered)
                    busy = False
                steps += 1
            took = time.perf_counter() - begin
            observed = worker.take_observations()
            reads = [(row[3], row[1]) for row in observed["transfers"]] if observed else []
            pipe.send((steps / took, waits, reads, took))


def measure(mib: int, seconds: float, repeat: int) -> dict[str, Any]:
    """Medians over the phases but the first with transfers, which connects."""
    blocks = mib * MIB // (LAYERS * BLOCK_BYTES)
    alone: list[tuple[float, float]] = []
    beside: list[tuple[float, float]] = []
    waits: list[float] = []
    reads: list[tuple[int, float]] = []
    moved_per_s: list[float] = []
    with processes([(_prefill, blocks), (_decode, blocks)]) as (prefill, decode):
        address = prefill.recv()
        decode.recv()
        decode.send(address)
        for phase in range(2 * repeat + 2):
            moving = phase % 2 == 1
            prefill.send(seconds)
            decode.send((seconds, moving))
            there, (here, waited, moved, took) = prefill.recv(), decode.recv()
            if phase < 2:
                continue
            (beside if moving else alone).append((there, here))
            waits += waited
            reads += moved
            if moving:
                moved_per_s.append(sum(size for size, _ in moved) / took)
        prefill.send(None)
        decode.send(None)
    row: dict[str, Any] = {
        "bytes": blocks * BLOCK_BYTES * LAYERS,
        "transfers": len(waits),
        "read_bytes_per_s": statistics.median(size / took for size, took in reads),
        "order_to_known_s": statistics.median(waits),
    }
    for side, name in enumerate(("prefill", "decode")):
        without, with_ = (statistics.median(steps[side] for steps in both) for both in (alone, beside))
        row[f"{name}_steps_per_s_alone"], row[f"{name}_steps_per_s_beside"] = without, with_
        row[f"{name}_s_lost_per_gb"] = (1 - with_ / without) / (statistics.median(moved_per_s) / 1e9)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of a cache that is moved")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a phase")
    parser.add_argument("--repeat", type=int, default=4, help="phases of each kind")
    parser.add_argument("--transports", default="", help="UCX_TLS, for instance tcp (default: what UCX finds)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    set_ucx_defaults(os.environ)
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if arguments.transports:
        os.environ["UCX_TLS"] = arguments.transports
    row = measure(arguments.mib, arguments.seconds, max(arguments.repeat, 1))
    print(
        f"{arguments.mib} MiB, {row['transfers']} transfers: {row['read_bytes_per_s'] / 1e9:.2f} GB/s, order to"
        f" known {1e3 * row['order_to_known_s']:.0f} ms (medians); steps/s"
        + "".join(
            f", {name} {row[f'{name}_steps_per_s_alone']:.0f} alone, {row[f'{name}_steps_per_s_beside']:.0f}"
            f" beside ({1e3 * row[f'{name}_s_lost_per_gb']:.0f} ms lost per GB)"
            for name in ("prefill", "decode")
        ),
        file=sys.stderr,
    )
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
