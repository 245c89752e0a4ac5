"""How much of a KV transfer is left to wait for when the prefill has ended: legs in turn, or overlapped.

    python benchmarks/kv_overlap.py transfer [--mib 128] [--chunks 8] [--prefill-s 1] [--busy] [--repeat 5]
                                             [--transports tcp] [--gbps 4]
    python benchmarks/kv_overlap.py engines [--requests 12] [--prompt 900]

`transfer` needs no model: a prefill worker steps through chunks and layers at the given pace (asleep as a
GPU's host is, or with `--busy` computing on a core), and a decode worker fetches the cache with the real
connector, in processes of their own. Exposed is the time from the end of the prefill's last step to the decode
side's word that all is there, for three ways that take turns: the whole cache after the prefill, chunk by
chunk, layer by layer. `--gbps` limits the link: the benchmark then runs in a network namespace of its own (root
only) over TCP.
`engines` starts two real engines on CPU and times, as a client sees it, the first token of leg 2 after leg 1's
answer (in turn: leg 2 is sent then; overlapped: it was sent along with leg 1), and both from the start.
Figures are min / median / max of the rounds but the first, which connects.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from kv_transfer import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    CONNECTORS,
    LAYERS,
    MIB,
    cache_worker,
    limit_link,
    processes,
    reading_worker,
    running_engine,
    spread,
    wait_ended,
    wait_ready,
)

WAYS = ("in turn", "chunk by chunk", "layer by layer")


def _pause(seconds: float, busy: bool) -> None:
    if not busy:
        time.sleep(seconds)
        return
    end, numbers = time.thread_time() + seconds, np.ones(1 << 14)
    while time.thread_time() < end:  # CPU time of this thread: what others take from it makes it longer
        numbers = np.sqrt(numbers + 1.0)


def _prefill(pipe: Connection, blocks: int, chunks: int, prefill_s: float, busy: bool, repeat: int) -> None:
    from hexgen2.vllm_plugin.kv_connector.leases import LeaseOrder
    from hexgen2.vllm_plugin.kv_connector.streams import StreamStep

    worker, arrays = cache_worker(1, 0, blocks)
    pipe.send((worker.address.host, worker.address.port, worker.address.incarnation))
    there = np.random.default_rng(0).permutation(blocks).tolist()
    bounds = [blocks * number // chunks for number in range(chunks + 1)]
    for number in range(1, len(WAYS) * repeat + 1):
        way = pipe.recv()
        begin = time.monotonic()
        for first, end in pairwise(bounds):
            step = StreamStep(
                f"k{number}", f"r{number}", first * BLOCK_TOKENS, end * BLOCK_TOKENS, tuple(there[first:end])
            )
            worker.begin_step([] if way == "in turn" else [step], [])
            for layer in range(LAYERS):
                _pause(prefill_s / chunks / LAYERS, busy)
                if way == "layer by layer":
                    worker.layer_done(f"layers.{layer}")
            worker.end_step()
        ended = time.monotonic()
        key = "" if way == "in turn" else f"k{number}"
        worker.take([LeaseOrder(number, f"r{number}", 600.0, key)], [])
        pipe.send((there, begin, ended))
    pipe.recv()
    worker.close()
    del arrays


def _decode(pipe: Connection, blocks: int) -> None:
    from hexgen2.vllm_plugin.kv_connector.loader import LoadOrder
    from hexgen2.vllm_plugin.kv_connector.params import VERSION, Offer, Stream

    with reading_worker(pipe, blocks) as (worker, workers):
        tokens = blocks * BLOCK_TOKENS
        while (order := pipe.recv()) is not None:
            number, there = order
            source = (
                Stream(VERSION, "prefill", f"k{number}", 600.0, BLOCK_TOKENS, workers)
                if there is None
                else Offer(VERSION, "prefill", number, 600.0, tokens, BLOCK_TOKENS, tuple(there), workers)
            )
            name = f"r{number}"
            worker.take([], [LoadOrder(name, source, 0, tokens, tuple(range(blocks)), BLOCK_TOKENS)])
            wait_ended(worker, "received", {name})
            ended = time.monotonic()
            moved = sum(row[3] for row in worker.take_observations()["transfers"])
            assert moved == blocks * BLOCK_BYTES * LAYERS, f"{moved} bytes were moved"
            pipe.send(ended)


def transfer(mib: int, chunks: int, prefill_s: float, busy: bool, repeat: int) -> list[dict[str, Any]]:
    blocks = mib * MIB // (LAYERS * BLOCK_BYTES)
    rounds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    targets = [(_prefill, blocks, chunks, prefill_s, busy, repeat), (_decode, blocks)]
    with processes(targets) as (prefill, decode):
        address = prefill.recv()
        decode.recv()
        decode.send(address)
        for number in range(1, len(WAYS) * repeat + 1):
            way = WAYS[(number - 1) % len(WAYS)]
            prefill.send(way)
            if way != "in turn":
                decode.send((number, None))
            there, begin, computed = prefill.recv()
            if way == "in turn":
                decode.send((number, there))
            loaded = decode.recv()
            rounds[way].append((computed - begin, loaded - computed))
        decode.send(None)
        prefill.send(None)
    rows = []
    for way, figures in rounds.items():
        prefills, exposed = zip(*figures[1:], strict=True)
        row = {
            "way": way,
            "bytes": blocks * BLOCK_BYTES * LAYERS,
            "chunks": chunks,
            "prefill_s": spread(prefills),
            "exposed_s": spread(exposed),
            "whole_s": spread([a + b for a, b in zip(prefills, exposed, strict=True)]),
        }
        _tell(f"{mib} MiB, {chunks} chunks, {way}", row, ("prefill_s", "exposed_s", "whole_s"))
        rows.append(row)
    return rows


def _tell(title: str, row: dict[str, Any], names: Sequence[str]) -> None:
    def shown(name: str) -> str:
        low, middle, high = (1e3 * row[name][part] for part in ("min", "median", "max"))
        return f"{name.removesuffix('_s').replace('_', ' ')} {low:.1f} / {middle:.1f} / {high:.1f} ms"

    print(f"{title}: {', '.join(map(shown, names))}", file=sys.stderr)


# Real engines.


def engines(count: int, length: int, chunk: int) -> list[dict[str, Any]]:
    import requests

    dice = np.random.default_rng(2)
    kv = {"do_remote_decode": True, "do_remote_prefill": False}
    more = ("--enable-chunked-prefill", "--max-num-batched-tokens", str(chunk))
    figures: dict[str, list[tuple[float, float]]] = {"in turn": [], "overlapped": []}
    with TemporaryDirectory() as folder, ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        urls = []
        for number, role in enumerate(("prefill", "decode")):
            config = {**CONNECTORS["hexgen"], "kv_role": "kv_both", "engine_id": role}
            urls.append(
                stack.enter_context(running_engine(Path(folder), role, config, 18900 + 10 * number, *more))
            )
        for url in urls:
            wait_ready(url)

        def post(side: int, prompt: list[int], params: dict[str, Any]) -> tuple[float, dict[str, Any]]:
            body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0}
            answer = requests.post(
                f"{urls[side]}/v1/completions", json={**body, "kv_transfer_params": params}, timeout=60
            )
            answer.raise_for_status()
            return time.perf_counter(), answer.json()

        stream: dict[str, Any] = {}
        for number in range(count + 2):
            for way, found in figures.items():
                prompt = dice.integers(8, 2048, length).tolist()
                begin = time.perf_counter()
                if way == "in turn":
                    computed, first = post(0, prompt, kv)
                    stream = first["kv_transfer_params"]["hexgen_stream"]
                    answered, _ = post(1, prompt, first["kv_transfer_params"])
                else:
                    named = {**stream, "key": f"b{number}"}
                    leg = pool.submit(post, 0, prompt, {**kv, "hexgen_stream": named})
                    answered, _ = post(1, prompt, {"do_remote_prefill": True, "hexgen_stream": named})
                    computed, _ = leg.result()
                found.append((answered - computed, answered - begin))
    rows = []
    for way, found in figures.items():
        exposed, whole = zip(*found[2:], strict=True)
        row = {"way": way, "prompt_tokens": length, "chunk_tokens": chunk, "exposed_s": spread(exposed)}
        rows.append({**row, "first_token_s": spread(whole)})
        _tell(f"{length} tokens in chunks of {chunk}, {way}", rows[-1], ("exposed_s", "first_token_s"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    moved = commands.add_parser("transfer")
    moved.add_argument("--mib", type=int, default=128, help="size of the cache that is moved")
    moved.add_argument("--chunks", type=int, default=8, help="chunks of the prefill")
    moved.add_argument("--prefill-s", type=float, default=1.0, help="seconds of the prefill")
    moved.add_argument("--busy", action="store_true", help="the prefill computes on a core instead of sleeping")
    moved.add_argument("--repeat", type=int, default=5)
    moved.add_argument("--transports", default="", help="UCX_TLS, for instance tcp (default: what UCX finds)")
    moved.add_argument("--gbps", type=float, help="rate of the link, in Gb/s; over TCP")
    real = commands.add_parser("engines")
    real.add_argument("--requests", type=int, default=12)
    real.add_argument("--prompt", type=int, default=900)
    real.add_argument("--chunk", type=int, default=96)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if arguments.command == "engines":
        rows = engines(arguments.requests, arguments.prompt, arguments.chunk)
    else:
        if arguments.gbps:
            limit_link(arguments.gbps)
        transports = arguments.transports or ("tcp" if arguments.gbps else "")
        if transports:
            os.environ["UCX_TLS"] = transports
        rows = transfer(
            arguments.mib, arguments.chunks, arguments.prefill_s, arguments.busy, max(arguments.repeat, 2)
        )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
