"""How fast the KV connector moves a cache, against raw NIXL, and how soon the first token comes, against vLLM's
own.

    python benchmarks/kv_transfer.py rate [--mib 128] [--repeat 7] [--transports tcp] [--gbps 12]
    python benchmarks/kv_transfer.py first-token [--requests 20]

`rate` needs no model: processes of their own hold the caches, joined by the same UCX transports for both sides
of the comparison (all that UCX finds, or those named). Raw NIXL reads the same bytes with the same number of
processes, in 1 MiB descriptors, with nothing around it; all its processes look at the network without a pause
(`--raw-pause-ms`: with one) for as long as a round takes. The two take turns, and the best round of each counts
(the median is told too), since the machine may be busy with other things. The connector is driven as vLLM
drives it: an order in, the end out; "order to end" has announcing, checking and both thread changes in it.
Processor time is that of all processes of a round, from the order to the end. Unlike layouts read twice the
descriptors, half the size. `--gbps` limits the link: all then runs in a network namespace of its own (root
only) over TCP. `first-token` starts two real engines on CPU with each connector and times leg 2
with `max_tokens` 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hexgen2.specs.ucx import set_ucx_defaults

LAYERS, KV_HEADS, STATE_BYTES, BLOCK_TOKENS = 16, 8, 512, 128  # head size 128, K and V, bf16
BLOCK_BYTES = KV_HEADS * STATE_BYTES * BLOCK_TOKENS  # of one layer: 512 KiB
MIB = 1 << 20
INSIDE = "HEXGEN2_BENCHMARK_IN_NAMESPACE"
LAYOUTS = {"TP1 -> TP1": (1, 1), "TP2 -> TP1": (2, 1), "TP1 -> TP2": (1, 2)}


# The connector.


def cache_worker(tp: int, rank: int, blocks: int) -> tuple[Any, list[np.ndarray]]:
    """A worker with its part of the cache, listening."""
    from hexgen2.vllm_plugin.kv_connector.settings import Settings
    from hexgen2.vllm_plugin.kv_connector.shards import LayerShard, Slab, WorkerTable, head_interval
    from hexgen2.vllm_plugin.kv_connector.worker_side import WorkerSide

    first, heads = head_interval(KV_HEADS, tp, rank)
    arrays, shards = [], []
    for layer in range(LAYERS):
        array = np.full(blocks * heads * STATE_BYTES * BLOCK_TOKENS, rank + 1, dtype=np.uint8)
        arrays.append(array)
        shards.append(
            LayerShard(
                layer=f"layers.{layer}",
                first_head=first,
                heads=heads,
                total_heads=KV_HEADS,
                address=array.ctypes.data,
                blocks=blocks,
                block_tokens=BLOCK_TOKENS,
                block_stride=heads * STATE_BYTES * BLOCK_TOKENS,
                head_stride=STATE_BYTES * BLOCK_TOKENS,
                token_stride=STATE_BYTES,
                state_bytes=STATE_BYTES,
                element_bytes=2,
                slab=Slab.ROWS,
            )
        )
    worker = WorkerSide(f"tp{tp}", "benchmark", "127.0.0.1", Settings())
    table = WorkerTable(rank, "DRAM", 0, "benchmark", tuple(shards))
    worker.start(table, [(array.ctypes.data, array.nbytes, 0) for array in arrays])
    return worker, arrays


@contextmanager
def reading_worker(pipe: Connection, blocks: int) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """A worker of one rank that says when it is ready, and the address, which it hears, to read from."""
    from hexgen2.vllm_plugin.kv_connector.params import WorkerAddress

    worker, arrays = cache_worker(1, 0, blocks)
    pipe.send("ready")
    yield worker, (WorkerAddress(*pipe.recv()),)
    worker.close()
    del arrays


def wait_ended(worker: Any, kind: str, wanted: set[str]) -> None:
    """Poll as an engine does that has nothing else to do: it sleeps a millisecond between two steps."""
    seen: set[str] = set()
    while seen < wanted:
        ended = worker.take_ended()
        assert not ended.failed, "a transfer failed"
        seen |= getattr(ended, kind)
        time.sleep(0.001)


def _prefill(pipe: Connection, tp: int, rank: int, blocks: int, repeat: int) -> None:
    from hexgen2.vllm_plugin.kv_connector.leases import LeaseOrder

    worker, arrays = cache_worker(tp, rank, blocks)
    worker.take([LeaseOrder(n, f"r{n}", 600.0) for n in range(1, repeat + 1)], [])
    pipe.send((worker.address.host, worker.address.port, worker.address.incarnation))
    pipe.recv()
    worker.close()
    del arrays


def _decode(pipe: Connection, tp: int, rank: int, blocks: int, repeat: int) -> None:
    from hexgen2.vllm_plugin.kv_connector.loader import LoadOrder
    from hexgen2.vllm_plugin.kv_connector.params import VERSION, Offer, WorkerAddress

    worker, arrays = cache_worker(tp, rank, blocks)
    pipe.send("ready")
    workers = tuple(WorkerAddress(*address) for address in pipe.recv())
    reads = noted_reads(worker)
    tokens = blocks * BLOCK_TOKENS
    there = np.random.default_rng(0).permutation(blocks).tolist()  # a busy engine's blocks lie anywhere
    for number in range(1, repeat + 1):
        pipe.recv()
        offer = Offer(VERSION, "prefill", number, 600.0, tokens, BLOCK_TOKENS, tuple(there), workers)
        order = LoadOrder(f"r{number}", offer, 0, tokens, tuple(range(blocks)), BLOCK_TOKENS)
        reads.clear()
        worker.take([], [order])
        wait_ended(worker, "received", {order.request})
        moved = sum(row[3] for row in worker.take_observations()["transfers"])
        pipe.send((moved, min(begin for begin, _ in reads), max(end for _, end in reads)))
    worker.close()
    del arrays


def noted_reads(worker: Any) -> list[tuple[float, float]]:
    """Begin and end of each read that the worker will make, on the machine's clock."""
    read, reads = worker._transport.read, []

    async def noted_read(*arguments: Any) -> Any:
        begin = time.perf_counter()
        report = await read(*arguments)
        reads.append((begin, time.perf_counter()))
        return report

    worker._transport.read = noted_read
    return reads


# Raw NIXL.


def raw_agent(name: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    # Without NIXL's own progress thread: it polls without a pause, which on few cores slows down all there is.
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def raw_buffers(size: int) -> list[np.ndarray]:
    """`size` bytes in one buffer a layer, as engines have them."""
    return [np.full(size // LAYERS, 1, dtype=np.uint8) for _ in range(LAYERS)]


def raw_pieces(addresses: Sequence[int], first: int, size: int) -> np.ndarray:
    """Bytes `first` to `first + size` of each layer's buffer as (address, length, device) of at most 1 MiB."""
    starts = np.arange(0, size, MIB)
    rows = [(address + first + start, min(MIB, size - start), 0) for address in addresses for start in starts]
    return np.array(rows, dtype=np.uint64)


def pause(seconds: float) -> None:
    """Between two looks at the network; with 0 seconds only who shares the core may go first."""
    if seconds:
        time.sleep(seconds)
    else:
        os.sched_yield()


def _raw_source(pipe: Connection, rank: int, size: int, pause_s: float) -> None:
    agent = raw_agent(f"source{rank}")
    buffers = raw_buffers(size)
    agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "") for buffer in buffers], "DRAM")
    pipe.send((agent.get_agent_metadata(), [buffer.ctypes.data for buffer in buffers]))
    while pipe.recv() == "look":
        while not pipe.poll(0):
            agent.get_new_notifs()
            pause(pause_s)
        pipe.recv()  # the round is over; the connector's should have the machine for themselves


def _raw_reader(pipe: Connection, rank: int, size: int, repeat: int, pause_s: float) -> None:
    agent = raw_agent(f"reader{rank}")
    buffers = raw_buffers(size)
    here = [buffer.ctypes.data for buffer in buffers]
    agent.register_memory([(buffer.ctypes.data, buffer.nbytes, 0, "") for buffer in buffers], "DRAM")
    pipe.send("ready")
    sources = [(agent.add_remote_agent(metadata), there, first) for metadata, there, first in pipe.recv()]
    part = size // len(sources) // LAYERS
    for _ in range(repeat):
        pipe.recv()
        begin = time.perf_counter()
        handles = []
        for number, (peer, there, first) in enumerate(sources):
            local = agent.get_xfer_descs(raw_pieces(here, number * part, part), "DRAM")
            remote = agent.get_xfer_descs(raw_pieces(there, first, part), "DRAM")
            handles.append(agent.initialize_xfer("READ", local, remote, peer))
            assert agent.transfer(handles[-1]) != "ERR"
        while handles:
            for handle in list(handles):
                if agent.check_xfer_state(handle) == "DONE":
                    handle.release()
                    handles.remove(handle)
            pause(pause_s)
        pipe.send((part * LAYERS * len(sources), begin, time.perf_counter()))


# The comparison.


class Pipes(list[Connection]):
    """The ends of the pipes to some processes, and the processes' numbers."""

    pids: tuple[int, ...] = ()

    def cpu_s(self) -> float:
        """Processor time that the processes have taken so far, in seconds (Linux)."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids)  # as clock_getcpuclockid(3) has it


@contextmanager
def processes(targets: Sequence[tuple[Any, ...]]) -> Iterator[Pipes]:
    """One process for each (function, arguments...); the ends of their pipes."""
    context = mp.get_context("spawn")
    pipes, started = Pipes(), []
    try:
        for function, *arguments in targets:
            here, there = context.Pipe()
            started.append(context.Process(target=function, args=(there, *arguments), daemon=True))
            started[-1].start()
            pipes.append(here)
        pipes.pids = tuple(process.pid or 0 for process in started)
        yield pipes
    finally:
        for process in started:
            process.join(0.5)
            process.kill()
            process.join()


@dataclass
class Rounds:
    """Bytes of a round; of each round the seconds from the first reader's first read to the end of the last
    (`read_s`), those from the order to the last reader's word that all is there (`whole_s`), and the processor
    time of all processes in that time (`cpu_s`). The last of the processes are the readers; with `watched` the
    first are told when to look at the network.
    """

    pipes: Pipes
    readers: int
    watched: bool = False
    size: int = 0
    read_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def run(self) -> None:
        """One round: all readers read at once."""
        readers, sources = self.pipes[-self.readers :], self.pipes[: -self.readers if self.watched else 0]
        for pipe in sources:
            pipe.send("look")
        used, begin = self.pipes.cpu_s(), time.perf_counter()
        for pipe in readers:
            pipe.send("go")
        answers = [pipe.recv() for pipe in readers]
        self.whole_s.append(time.perf_counter() - begin)
        self.cpu_s.append(self.pipes.cpu_s() - used)
        for pipe in sources:
            pipe.send("rest")
        sizes, begins, ends = zip(*answers, strict=True)
        self.read_s.append(max(ends) - min(begins))
        self.size = sum(sizes)

    def best(self) -> tuple[float, float]:
        """Bytes/s of the reads and seconds of the whole, in their best rounds but the first (it connects)."""
        return self.size / min(self.read_s[1:]), min(self.whole_s[1:])

    def median_rate(self) -> float:
        return self.size / statistics.median(self.read_s[1:])

    def ratios(self, other: Rounds) -> dict[str, float]:
        """Its rates over those of another's rounds that were run in turn with them, round by round."""
        rounds = zip(self.read_s[1:], other.read_s[1:], strict=True)
        return spread([their_s / our_s for our_s, their_s in rounds])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


@contextmanager
def connector_rounds(senders: int, receivers: int, size: int, repeat: int) -> Iterator[Rounds]:
    blocks = size // (LAYERS * BLOCK_BYTES)
    prefill = [(_prefill, senders, rank, blocks, repeat) for rank in range(senders)]
    decode = [(_decode, receivers, rank, blocks, repeat) for rank in range(receivers)]
    with processes([*prefill, *decode]) as pipes:
        addresses = [pipe.recv() for pipe in pipes[:senders]]
        for pipe in pipes[senders:]:
            pipe.recv()
            pipe.send(addresses)
        yield Rounds(pipes, receivers)
        for pipe in pipes[:senders]:
            pipe.send("end")


@contextmanager
def raw_rounds(senders: int, receivers: int, size: int, repeat: int, pause_s: float) -> Iterator[Rounds]:
    sources = [(_raw_source, rank, size // senders, pause_s) for rank in range(senders)]
    readers = [(_raw_reader, rank, size // receivers, repeat, pause_s) for rank in range(receivers)]
    with processes([*sources, *readers]) as pipes:
        offers = [pipe.recv() for pipe in pipes[:senders]]
        for number, pipe in enumerate(pipes[senders:]):
            pipe.recv()
            first = number * size // receivers // LAYERS if senders == 1 else 0
            pipe.send([(metadata, addresses, first) for metadata, addresses in offers])
        yield Rounds(pipes, receivers, watched=True)
        for pipe in pipes[:senders]:
            pipe.send("end")


def compare_rates(mib: int, repeat: int, raw_pause_s: float) -> list[dict[str, Any]]:
    """Rounds of both in turn, so that a busy machine slows down both."""
    size = mib * MIB // (LAYERS * BLOCK_BYTES) * LAYERS * BLOCK_BYTES
    rows = []
    for name, (senders, receivers) in LAYOUTS.items():
        with (
            raw_rounds(senders, receivers, size, repeat, raw_pause_s) as theirs,
            connector_rounds(senders, receivers, size, repeat) as ours,
        ):
            for _ in range(repeat):
                theirs.run()
                ours.run()
        assert ours.size == theirs.size == size, f"{ours.size} bytes were moved, {size} were to be"
        (our_rate, our_whole), (their_rate, their_whole) = ours.best(), theirs.best()
        medians = (ours.median_rate(), theirs.median_rate())
        row: dict[str, Any] = {
            "layouts": name,
            "bytes": size,
            "connector_bytes_per_s": our_rate,
            "raw_bytes_per_s": their_rate,
            "ratio_of_best": our_rate / their_rate,
            "ratio_of_medians": medians[0] / medians[1],
            "ratio_by_round": ours.ratios(theirs),
            "connector_median_bytes_per_s": medians[0],
            "raw_median_bytes_per_s": medians[1],
            "connector_order_to_end_s": our_whole,
            "raw_order_to_end_s": their_whole,
            "connector_cpu_s": statistics.median(ours.cpu_s[1:]),
            "raw_cpu_s": statistics.median(theirs.cpu_s[1:]),
        }
        print(
            f"{name}: {size / MIB:.0f} MiB, connector {our_rate / 1e9:.2f} GB/s"
            f" (median {medians[0] / 1e9:.2f}), raw NIXL {their_rate / 1e9:.2f}"
            f" (median {medians[1] / 1e9:.2f}): {100 * row['ratio_of_best']:.0f}% of the best,"
            f" {100 * row['ratio_of_medians']:.0f}% of the medians, round by round"
            f" {' / '.join(f'{100 * ratio:.0f}%' for ratio in row['ratio_by_round'].values())};"
            f" order to end {1e3 * our_whole:.1f} ms, raw {1e3 * their_whole:.1f} ms;"
            f" processor time {1e3 * row['connector_cpu_s']:.0f} ms, raw {1e3 * row['raw_cpu_s']:.0f} ms",
            file=sys.stderr,
        )
        rows.append(row)
    return rows


# Time to the first token.

CONNECTORS = {
    "hexgen": {
        "kv_connector": "HexgenConnector",
        "kv_connector_module_path": "hexgen2.vllm_plugin.kv_connector.connector",
        "kv_connector_extra_config": {"host": "127.0.0.1"},
    },
    "nixl": {"kv_connector": "NixlConnector"},
}


@contextmanager
def running_engine(folder: Path, name: str, transfer: dict[str, Any], port: int, *more: str) -> Iterator[str]:
    """A CPU engine with the shipped model; its URL."""
    model = Path(str(resources.files("hexgen2"))) / "assets" / "tiny-llama"
    command = [
        *(
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--port",
            str(port),
        ),
        *("--served-model-name", "model", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(32 * MIB), "--max-model-len", "1024", "--max-num-seqs", "8"),
        *("--block-size", "32", "--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer)),
        *more,
    ]
    environment = {
        **os.environ,
        "HEXGEN2_VLLM_TUNING": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port + 1000),
        "VLLM_NO_USAGE_STATS": "1",
    }
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def first_token(requests_count: int) -> list[dict[str, Any]]:
    """Seconds from sending leg 2 to its whole answer of one token, for each connector."""
    import requests

    rows = []
    dice = np.random.default_rng(1)
    for number, (name, transfer) in enumerate(CONNECTORS.items()):
        with TemporaryDirectory() as folder, ExitStack() as stack:
            urls = [
                stack.enter_context(
                    running_engine(
                        Path(folder),
                        role,
                        {**transfer, "kv_role": role, "engine_id": f"{name}-{role}"},
                        18500 + 100 * number + 10 * side,
                    )
                )
                for side, role in enumerate(("kv_producer", "kv_consumer"))
            ]
            for url in urls:
                wait_ready(url)
            seconds = []
            for _ in range(requests_count + 2):
                prompt = dice.integers(8, 2048, 400).tolist()
                body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0}
                leg = {"do_remote_decode": True, "do_remote_prefill": False}
                first = requests.post(
                    f"{urls[0]}/v1/completions", json={**body, "kv_transfer_params": leg}, timeout=60
                ).json()
                begin = time.perf_counter()
                second = requests.post(
                    f"{urls[1]}/v1/completions",
                    json={**body, "kv_transfer_params": first["kv_transfer_params"]},
                    timeout=60,
                )
                seconds.append(time.perf_counter() - begin)
                assert second.status_code == 200, second.text
                assert second.json()["choices"][0]["finish_reason"] == "length", second.text
        seconds = sorted(seconds[2:])  # the first ones make the connections
        row = {
            "connector": name,
            "requests": len(seconds),
            "median_s": statistics.median(seconds),
            "p90_s": seconds[int(0.9 * (len(seconds) - 1))],
        }
        print(
            f"{name}: first token of leg 2 after {1e3 * row['median_s']:.1f} ms (median),"
            f" {1e3 * row['p90_s']:.1f} ms (90%)",
            file=sys.stderr,
        )
        rows.append(row)
    return rows


def wait_ready(url: str) -> None:
    import requests

    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.3)
    raise TimeoutError(f"{url} is not ready")


def limit_link(gbps: float) -> None:
    """Start this program anew in a network namespace whose loopback has this rate; nothing there already."""
    if INSIDE in os.environ:
        return
    if shutil.which("unshare") is None or shutil.which("tc") is None:
        raise SystemExit("--gbps needs `unshare`, `ip` and `tc` (util-linux, iproute2) and root")
    limit = f"tc qdisc add dev lo root tbf rate {gbps}gbit burst 1mb latency 100ms"
    command = f'ip link set lo up && {limit} && exec "$0" "$@"'
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", "-n", "sh", "-c", command, sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rate = commands.add_parser("rate")
    rate.add_argument("--mib", type=int, default=128, help="size of the cache that is moved")
    rate.add_argument("--repeat", type=int, default=7)
    rate.add_argument("--transports", default="", help="UCX_TLS, for instance tcp (default: what UCX finds)")
    rate.add_argument("--gbps", type=float, help="rate of the link, in Gb/s; over TCP")
    rate.add_argument("--raw-pause-ms", type=float, default=0.0, help="pause between raw NIXL's looks")
    token = commands.add_parser("first-token")
    token.add_argument("--requests", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    set_ucx_defaults(os.environ)
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if arguments.command == "rate":
        if arguments.gbps:
            limit_link(arguments.gbps)
        if transports := arguments.transports or ("tcp" if arguments.gbps else ""):
            os.environ["UCX_TLS"] = transports
        rows = compare_rates(arguments.mib, max(arguments.repeat, 2), arguments.raw_pause_ms / 1e3)
    else:
        rows = first_token(arguments.requests)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
