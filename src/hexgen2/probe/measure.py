"""Quick measurements of one core and of the loopback interface: `python -m hexgen2.probe.measure` prints JSON.

A process of its own, since the number of threads of a matrix product is settled when numpy is imported. Each
figure is the best of several runs, and a core's are of CPU time, not of the clock on the wall: what else runs
on the machine only ever makes them smaller.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from pydantic import Field

from hexgen2.specs.base import Spec

PRODUCT_SIZE = 1024
ARRAY_BYTES = 128 * 2**20
MESSAGE_BYTES = 2**20
MESSAGES = 128
PINGS = 500
RUNS = 5
TIMEOUT_S = 120.0

SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class CoreFigures(Spec):
    """One core: FLOP/s of an FP32 matrix product, bytes/s of reading memory. Loopback: bytes/s, seconds."""

    flops: float = Field(gt=0)
    memory_bandwidth: float = Field(gt=0)
    loopback_bandwidth: float = Field(gt=0)
    loopback_latency: float = Field(gt=0)


def measure_core() -> CoreFigures:
    """Measure in a process of its own (some seconds)."""
    done = subprocess.run(
        [sys.executable, "-m", "hexgen2.probe.measure"],
        env={**os.environ, **SINGLE_THREAD},
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    return CoreFigures.model_validate_json(done.stdout)


def matrix_flops() -> float:
    """FLOP/s of a product of FP32 matrices."""
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (rng.random((PRODUCT_SIZE, PRODUCT_SIZE), dtype=np.float32) for _ in range(2))
    return float(2 * PRODUCT_SIZE**3 / _best(lambda: a @ b, time.thread_time))


def memory_bandwidth() -> float:
    """Bytes/s of reading an array that no cache holds."""
    import numpy as np

    array = np.ones(ARRAY_BYTES // 4, dtype=np.float32)
    return ARRAY_BYTES / _best(lambda: np.dot(array, array), time.thread_time)


def loopback() -> tuple[float, float]:
    """(bytes/s, seconds one way) of TCP over 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    with client, peer:
        for end in (client, peer):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        latency = _ping(client, peer)
        bandwidth = MESSAGES * MESSAGE_BYTES / _best(lambda: _stream(client, peer), time.perf_counter, runs=3)
    return bandwidth, latency


def _stream(client: socket.socket, peer: socket.socket) -> None:
    def send() -> None:
        for _ in range(MESSAGES):
            client.sendall(bytes(MESSAGE_BYTES))

    sender = threading.Thread(target=send)
    sender.start()
    _receive(peer, MESSAGES * MESSAGE_BYTES)
    sender.join()


def _ping(client: socket.socket, peer: socket.socket) -> float:
    def answer() -> None:
        for _ in range(PINGS):
            peer.sendall(peer.recv(1))

    answering = threading.Thread(target=answer)
    answering.start()
    times = []
    for _ in range(PINGS):
        start = time.perf_counter()
        client.sendall(b".")
        client.recv(1)
        times.append(time.perf_counter() - start)
    answering.join()
    return statistics.median(times) / 2


def _receive(peer: socket.socket, count: int) -> None:
    buffer = memoryview(bytearray(MESSAGE_BYTES))
    while count > 0:
        count -= peer.recv_into(buffer)


def _best(call: Callable[[], object], clock: Callable[[], float], runs: int = RUNS) -> float:
    """Seconds of the quickest of several runs, by a clock."""
    times = []
    for _ in range(runs):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def main() -> None:
    bandwidth, latency = loopback()
    figures = CoreFigures(
        flops=matrix_flops(),
        memory_bandwidth=memory_bandwidth(),
        loopback_bandwidth=bandwidth,
        loopback_latency=latency,
    )
    json.dump(figures.model_dump(), sys.stdout)


if __name__ == "__main__":
    main()
