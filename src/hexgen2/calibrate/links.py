"""Bandwidth and latency between two machines by real transfers, as KV caches make them.

One side serves (`serve`), the other reads from it (`measure`): over NIXL, the library that moves KV caches
between vLLM engines and that chooses RDMA where there is some, or over one plain TCP connection. Times of reads
of 4 KiB to 64 MiB are fitted as α + x/β; a read goes there and back, so the link's latency is half of α.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, log
from typing import Any, Literal

import numpy as np
from scipy.optimize import least_squares

from hexgen2.specs.errors import InputError
from hexgen2.specs.ucx import set_ucx_defaults

SIZES = tuple(1 << power for power in range(12, 27, 2))
LARGEST = SIZES[-1]
LEAST_REPEATS = 5
BYTES_PER_SIZE = 1 << 28
"""Small transfers are repeated more often: about so many bytes each, within 5 and 200 repeats."""
TIMEOUT_S = 60.0
_HEADER = struct.Struct("!Q")

Transport = Literal["nixl", "tcp"]
Read = Callable[[int], None]


@dataclass(frozen=True)
class LinkFit:
    """``bandwidth`` in bytes/s, ``latency`` one way in seconds; median absolute relative error of the fit."""

    bandwidth: float
    latency: float
    error: float

    def document(self) -> dict[str, float]:
        """As an entry of a cluster file's `network.links`."""
        return {"gbps": self.bandwidth * 8 / 1e9, "latency_ms": self.latency * 1e3, "error": self.error}


def fit_link(times: Mapping[int, float]) -> LinkFit:
    """α and β of α + x/β, of relative errors and robustly; ValueError with less than two sizes."""
    if len(times) < 2:
        raise ValueError("one size of transfers does not tell bandwidth from latency")
    sizes, seconds = np.array(list(times), dtype=float), np.array(list(times.values()))
    start = [log(min(seconds)), log(max(sizes) / max(seconds))]

    def residuals(logs: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.log((np.exp(logs[0]) + sizes / np.exp(logs[1])) / seconds)
        return found

    solved = least_squares(residuals, start, loss="soft_l1", f_scale=0.05)
    error = float(np.median(np.abs(np.expm1(residuals(solved.x)))))
    return LinkFit(bandwidth=exp(solved.x[1]), latency=exp(solved.x[0]) / 2, error=error)


def sizes_to(largest: int) -> tuple[int, ...]:
    """The sizes of reads up to ``largest`` bytes; InputError where that leaves less than two."""
    sizes = tuple(size for size in SIZES if size <= largest)
    if len(sizes) < 2:
        raise InputError("--largest", "", f"is {largest} bytes", f"give {SIZES[1]} at least")
    return sizes


def measure(host: str, port: int, transport: Transport, sizes: Sequence[int] = SIZES) -> dict[int, float]:
    """Median seconds of a read of each size; InputError where nobody serves there."""
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with _nixl_reader(connection) if transport == "nixl" else _tcp_reader(connection) as read:
                return {size: _timed(read, size) for size in sizes}
    except (OSError, EOFError) as error:
        raise InputError(
            f"{host}:{port}", "", f"cannot be measured ({error})", "run `hexgen2 calibrate --serve-links` there"
        ) from None


def _timed(read: Read, size: int) -> float:
    read(size)  # the first of a size may set things up
    times: list[float] = []
    for _ in range(min(200, max(LEAST_REPEATS, BYTES_PER_SIZE // (64 * size)))):
        begin = time.perf_counter()
        read(size)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@contextmanager
def serving(host: str, port: int = 0) -> Iterator[int]:
    """Serve reads on a port (0: a free one) in the background; yields the port."""
    with socket.create_server((host, port)) as server:
        server.settimeout(0.2)
        ended = threading.Event()
        thread = threading.Thread(target=_accept, args=(server, ended), daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            thread.join(TIMEOUT_S)


def _accept(server: socket.socket, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        with connection:
            connection.settimeout(TIMEOUT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                _serve(connection)
            except (OSError, EOFError, ImportError):
                continue  # the reader has gone, or wants NIXL where there is none: the next one


def _serve(connection: socket.socket) -> None:
    """Sizes come, so many bytes go back; size 0 asks for what a NIXL agent must know, to read by itself."""
    data = np.ones(LARGEST, dtype=np.uint8)
    agent = None
    while True:
        try:
            (size,) = _HEADER.unpack(_receive(connection, _HEADER.size))
        except EOFError:
            break
        if size:
            connection.sendall(data[: min(size, LARGEST)].data)
            continue
        agent = _agent("link-server")
        agent.register_memory([(data.ctypes.data, data.nbytes, 0, "")], "DRAM")
        told = json.dumps({"address": data.ctypes.data}).encode()
        for part in (told, agent.get_agent_metadata()):
            connection.sendall(_HEADER.pack(len(part)) + part)
    del agent


@contextmanager
def _tcp_reader(connection: socket.socket) -> Iterator[Read]:
    buffer = memoryview(bytearray(LARGEST))

    def read(size: int) -> None:
        connection.sendall(_HEADER.pack(size))
        got = 0
        while got < size:
            count = connection.recv_into(buffer[got:size])
            if not count:
                raise EOFError("the other side has closed the connection")
            got += count

    yield read


@contextmanager
def _nixl_reader(connection: socket.socket) -> Iterator[Read]:
    connection.sendall(_HEADER.pack(0))
    told = json.loads(_message(connection))
    agent = _agent("link-reader")
    peer = agent.add_remote_agent(_message(connection))
    buffer = np.zeros(LARGEST, dtype=np.uint8)
    agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "")], "DRAM")

    def read(size: int) -> None:
        local = agent.get_xfer_descs([(buffer.ctypes.data, size, 0)], "DRAM")
        remote = agent.get_xfer_descs([(told["address"], size, 0)], "DRAM")
        handle = agent.initialize_xfer("READ", local, remote, peer)
        state = agent.transfer(handle)
        began = time.monotonic()
        while state != "DONE":
            if state == "ERR" or time.monotonic() - began > TIMEOUT_S:
                raise OSError("a NIXL transfer failed")
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)

    yield read


def _agent(name: str) -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    set_ucx_defaults(os.environ)
    from nixl._api import nixl_agent, nixl_agent_config

    for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)):
        if logger.name.startswith("nixl"):
            logger.setLevel(logging.WARNING)  # its news would go to stdout, among the results
    return nixl_agent(f"{name}-{time.time_ns()}", nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))


def _message(connection: socket.socket) -> bytes:
    (size,) = _HEADER.unpack(_receive(connection, _HEADER.size))
    return _receive(connection, size)


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise EOFError("the other side has closed the connection")
        parts += part
    return bytes(parts)
