"""The worker's half where things do not go as they should. NIXL is not needed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from hexgen2.vllm_plugin.kv_connector import worker_side
from hexgen2.vllm_plugin.kv_connector.loop_thread import LoopThread
from hexgen2.vllm_plugin.kv_connector.settings import Settings
from hexgen2.vllm_plugin.kv_connector.shards import LayerShard, Slab, WorkerTable
from tests.waiting import HUNG_S

SHARD = LayerShard("l0", 0, 2, 4, 0, 8, 16, 4096, 2048, 128, 128, 2, Slab.ROWS)
TABLE = WorkerTable(0, "DRAM", 0, "x", (SHARD,))


def test_a_cache_that_takes_too_long_to_register_is_no_matter_of_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = threading.Event()

    class Slow:
        metadata = b""

        def __init__(self, *_: Any) -> None: ...

        def register(self, _: Any) -> None:
            registered.wait(HUNG_S)

        def close(self) -> None: ...

    monkeypatch.setattr(worker_side, "NixlTransport", Slow)
    monkeypatch.setattr(worker_side, "START_S", 0.01)
    side = worker_side.WorkerSide("engine", "model", "127.0.0.1", Settings())
    try:
        with pytest.raises(RuntimeError, match=r"could not be registered with NIXL within 0\.01 s"):
            side.start(TABLE, [])
    finally:
        registered.set()
        side.close()


def test_what_runs_on_a_thread_that_is_stopped_is_cancelled() -> None:
    begun, ended = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    thread = LoopThread("a-test")
    thread.start(work())
    assert begun.wait(HUNG_S)
    thread.stop(HUNG_S)
    assert ended.is_set()
