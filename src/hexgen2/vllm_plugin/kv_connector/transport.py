"""Reading a peer's memory with NIXL.

One agent a worker, one registration of its KV cache, and reads (pull): over shared memory, RDMA and CUDA IPC
the prefill side has no part in a read at all, so nothing waits for its engine to step. NIXL's progress thread
is left out: it would poll for as long as the process lives. Instead the `pump` looks at the network while
somebody reads (TCP and the first contact need it on both sides), and is otherwise idle.

All methods must be called from one thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hexgen2.specs.ucx import set_ucx_defaults
from hexgen2.vllm_plugin.kv_connector.pump import Pump
from hexgen2.vllm_plugin.kv_connector.regions import Array, Regions

logger = logging.getLogger("vllm.hexgen2.kv")

LONGEST_POST = 16 * 1024 * 1024
"""Bytes of one posted read: over shared memory a post copies before it returns, and the loop should turn in
between.
"""
COMPLAIN_S = 10.0
"""Pause between two log lines about a read that does not end."""


class TransferError(Exception):
    """A read that failed; nothing of it is under way any more."""


@dataclass(frozen=True)
class ReadReport:
    """What a read took: seconds from the first post to the last completion, of which `post_s` were posting."""

    bytes: int
    descriptors: int
    seconds: float
    post_s: float

    def __add__(self, other: ReadReport) -> ReadReport:
        """Two reads, one after the other."""
        return ReadReport(
            self.bytes + other.bytes,
            self.descriptors + other.descriptors,
            self.seconds + other.seconds,
            self.post_s + other.post_s,
        )


class NixlTransport:
    """A NIXL agent. `name` is the incarnation of its worker, by which peers know it; `memory` is `DRAM` or
    `VRAM`.
    """

    def __init__(self, name: str, backends: Sequence[str], memory: str) -> None:
        set_ucx_defaults(os.environ)
        from nixl._api import nixl_agent, nixl_agent_config

        self.name = name
        self._memory = memory
        self._agent: Any = nixl_agent(
            name, nixl_agent_config(enable_prog_thread=False, backends=list(backends))
        )
        missing = [backend for backend in backends if backend not in self._agent.backends]
        if missing:
            raise RuntimeError(
                f"NIXL has no backend {missing[0]}; it has {', '.join(self._agent.get_plugin_list())}"
            )
        self._registered: Any = None
        self._peers: set[str] = set()
        self._leaving: set[str] = set()
        self._reads: Counter[str] = Counter()
        self.pump = Pump(self.progress)

    def register(self, regions: Sequence[tuple[int, int, int]]) -> None:
        """Make memory known: (address, bytes, device) each. Once."""
        self._registered = self._agent.register_memory([(*region, "") for region in regions], self._memory)

    @property
    def metadata(self) -> bytes:
        """What a peer's `connect` needs."""
        return bytes(self._agent.get_agent_metadata())

    def connect(self, peer: str, metadata: bytes) -> None:
        """Make `peer` known and start the connection to it.

        Raises TransferError where reads from an earlier connection to it are not over.
        """
        if peer in self._leaving:
            raise TransferError("reads from an earlier connection to it are not over yet")
        added = self._agent.add_remote_agent(metadata)
        name = added.decode() if isinstance(added, bytes) else str(added)
        if name != peer:
            self._agent.remove_remote_agent(name)
            raise TransferError(f"its metadata is that of {name}")
        self._agent.make_connection(peer)
        self._peers.add(peer)

    def disconnect(self, peer: str) -> None:
        """Forget a peer, as soon as no read from it is under way.

        Not before: NIXL then reports the reads as failed although the network may still write what they asked
        for, into blocks that have long been given to another request.
        """
        if self._reads[peer]:
            self._leaving.add(peer)
            return
        self._leaving.discard(peer)
        if peer in self._peers:
            self._peers.discard(peer)
            try:
                self._agent.remove_remote_agent(peer)
            except Exception as error:  # NIXL raises its own types; there is nothing left to do with the peer
                logger.debug("forgetting peer %s: %s", peer, error)

    def progress(self) -> None:
        """Serve what peers need of this side."""
        self._agent.get_new_notifs()

    async def read(
        self,
        peer: str,
        regions: Regions,
        memory: str,
        local_device: int,
        remote_device: int,
        give_up: Callable[[], str],
    ) -> ReadReport:
        """Read all regions from `peer` and return when the last byte has arrived.

        `give_up` is asked now and then; with a non-empty answer the read counts as failed for that reason.
        Raises TransferError, but only when no part of the read can write to memory any more. There is no way to
        stop a read: a peer that hangs without being dead delays this until it moves again or dies.
        """
        begin = time.perf_counter()
        handles: list[Any] = []
        failure = ""
        self._reads[peer] += 1
        try:
            try:
                for part in _parts(regions, LONGEST_POST):
                    if failure := give_up():
                        break
                    handle = self._agent.initialize_xfer(
                        "READ",
                        self._descriptors(part.local, part.length, local_device, self._memory),
                        self._descriptors(part.remote, part.length, remote_device, memory),
                        peer,
                    )
                    handles.append(handle)
                    if self._agent.transfer(handle) == "ERR":
                        failure = "NIXL could not start the read"
                        break
                    await asyncio.sleep(0)
            except Exception as error:  # NIXL raises its own types for a peer that is gone
                failure = f"NIXL: {type(error).__name__} {error}".strip()
            post_s = time.perf_counter() - begin
            failure = await self._settle(handles, failure, give_up)
        finally:
            self._reads[peer] -= 1
            if not self._reads[peer]:
                del self._reads[peer]
                if peer in self._leaving:
                    self.disconnect(peer)
        if failure:
            raise TransferError(failure)
        return ReadReport(regions.total_bytes, len(regions), time.perf_counter() - begin, post_s)

    async def _settle(self, handles: list[Any], failure: str, give_up: Callable[[], str]) -> str:
        """Wait until no handle is under way; the reason of failure, or an empty string."""
        under_way = deque(handles)
        complain = 0.0

        def over() -> bool:
            nonlocal failure, complain
            # One after the other: all have to end, and to ask each of them at every look would be a lot.
            while under_way:
                state = self._state(under_way[0])
                if state == "PROC":
                    break
                failure = failure or ("" if state == "DONE" else f"the read failed ({state})")
                self._drop(under_way.popleft())
            failure = failure or (give_up() if under_way else "")
            if failure and under_way and time.monotonic() > complain:
                complain = time.monotonic() + COMPLAIN_S
                logger.warning("KV transfer: %s; its blocks stay reserved until the read is over", failure)
            return not under_way

        if not over():
            await self.pump.watch(over)
        return failure

    def _state(self, handle: Any) -> str:
        try:
            return str(self._agent.check_xfer_state(handle))
        except Exception as error:  # a lost peer is an exception here, not a state
            return f"{type(error).__name__} {error}".strip()

    @staticmethod
    def _drop(handle: Any) -> None:
        try:
            handle.release()
        except Exception as error:
            logger.debug("releasing a transfer: %s", error)

    def _descriptors(self, addresses: Array, lengths: Array, device: int, memory: str) -> Any:
        table = np.empty((len(addresses), 3), dtype=np.uint64)
        table[:, 0], table[:, 1], table[:, 2] = addresses, lengths, device
        return self._agent.get_xfer_descs(table, memory)

    def close(self) -> None:
        self.pump.close()
        for peer in list(self._peers):
            self.disconnect(peer)
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = None


def _parts(regions: Regions, longest: int) -> list[Regions]:
    """The regions in posts of about `longest` bytes; a single longer region is cut too."""
    if regions.total_bytes <= longest:
        return [regions] if len(regions) else []
    pieces = -(-regions.length // longest)
    if int(pieces.max()) > 1:
        index = np.repeat(np.arange(len(regions)), pieces)
        step = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        offset = step * longest
        regions = Regions(
            regions.local[index] + offset,
            regions.remote[index] + offset,
            np.minimum(regions.length[index] - offset, longest),
        )
    group = (np.cumsum(regions.length) - 1) // longest
    cuts = np.flatnonzero(np.diff(group)) + 1
    return [
        Regions(*arrays)
        for arrays in zip(
            np.split(regions.local, cuts),
            np.split(regions.remote, cuts),
            np.split(regions.length, cuts),
            strict=True,
        )
    ]
