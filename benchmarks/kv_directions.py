"""Pull against push: the decode side reads a cache, or the prefill side writes it, raw NIXL both times.

    python benchmarks/kv_directions.py [--mib 128] [--repeat 9] [--transports tcp] [--pause-ms 1]

Two processes with a cache each, in the buffers and pieces of `kv_transfer.py`. A round goes from the order to
the moment at which the decode side knows that all is there: its own read has ended, or the notification that
NIXL sends after a write has come. Reads and writes take turns. The side that does not move looks at the network
every `--pause-ms` (default: without a pause), the one that does without a pause.
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

from kv_transfer import LAYERS, MIB, processes, raw_agent, raw_buffers, raw_pieces, spread

from hexgen2.specs.ucx import set_ucx_defaults


def _side(pipe: Connection, name: str, size: int, pause_s: float) -> None:
    """One of the two. Moves the cache when told READ or WRITE; told "wait", waits for the other's write."""
    agent = raw_agent(name)
    buffers = raw_buffers(size)
    here = [buffer.ctypes.data for buffer in buffers]
    agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "") for buffer in buffers], "DRAM")
    pipe.send((agent.get_agent_metadata(), here))
    metadata, there = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    waiting = False
    while True:
        # Also while the other side reads: over TCP the side that does not move has its part in it.
        if any(agent.get_new_notifs().values()) and waiting:
            pipe.send(time.perf_counter())
            waiting = False
        if not pipe.poll(pause_s):
            continue
        order = pipe.recv()
        if order == "end":
            return
        if order == "wait":
            waiting = True
            continue
        sides = [agent.get_xfer_descs(raw_pieces(side, 0, size // LAYERS), "DRAM") for side in (here, there)]
        handle = agent.initialize_xfer(order, *sides, peer, b"written" if order == "WRITE" else b"")
        assert agent.transfer(handle) != "ERR"
        while agent.check_xfer_state(handle) != "DONE":
            pass
        handle.release()
        pipe.send(time.perf_counter())


def compare(size: int, repeat: int, pause_s: float) -> dict[str, Any]:
    """Bytes/s of both directions."""
    seconds: dict[str, list[float]] = {"READ": [], "WRITE": []}
    with processes([(_side, name, size, pause_s) for name in ("prefill", "decode")]) as (prefill, decode):
        for to, offer in zip((decode, prefill), (prefill.recv(), decode.recv()), strict=True):
            to.send(offer)
        for _ in range(repeat + 1):
            begin = time.perf_counter()
            decode.send("READ")
            seconds["READ"].append(decode.recv() - begin)
            begin = time.perf_counter()
            decode.send("wait")
            prefill.send("WRITE")
            seconds["WRITE"].append(decode.recv() - begin)
            prefill.recv()
        for pipe in (prefill, decode):
            pipe.send("end")
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first round connects
    return {
        "bytes": size,
        "pull_bytes_per_s": size / statistics.median(seconds["READ"]),
        "push_bytes_per_s": size / statistics.median(seconds["WRITE"]),
        "pull_over_push": spread(
            [write / read for read, write in zip(seconds["READ"], seconds["WRITE"], strict=True)]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="size of the cache that is moved")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--transports", default="", help="UCX_TLS, for instance tcp (default: what UCX finds)")
    parser.add_argument("--pause-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    set_ucx_defaults(os.environ)
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if arguments.transports:
        os.environ["UCX_TLS"] = arguments.transports
    row = compare(arguments.mib * MIB, arguments.repeat, arguments.pause_ms / 1e3)
    print(
        f"{arguments.mib} MiB: pull {row['pull_bytes_per_s'] / 1e9:.2f} GB/s,"
        f" push {row['push_bytes_per_s'] / 1e9:.2f} GB/s (medians); pull over push, round by round"
        f" {' / '.join(f'{100 * ratio:.0f}%' for ratio in row['pull_over_push'].values())}",
        file=sys.stderr,
    )
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
