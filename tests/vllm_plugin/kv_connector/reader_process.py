"""A decode worker whose prefill worker is killed or stopped under its hands; exits 0 if it takes it well.

Run in a process of its own, since UCX reads its environment (UCX_TLS) once.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from subprocess import PIPE, Popen

import numpy as np

from hexgen2.vllm_plugin.kv_connector.loader import LoadError, LoadOrder
from hexgen2.vllm_plugin.kv_connector.params import WorkerAddress
from tests.vllm_plugin.kv_connector.layouts import Stage, build_memories
from tests.vllm_plugin.kv_connector.prefill_process import BIG
from tests.vllm_plugin.kv_connector.workers import Worker, make_offer

LAYERS = 4
TIMEOUT_S = 1.0


async def signal_in_mid_read(
    worker: Worker, prefill: Popen[bytes], order: LoadOrder, number: int
) -> asyncio.Task:
    """Start the load, and send the signal once a part of the read has been posted."""
    posted = asyncio.Event()
    post = worker.transport._agent.transfer

    def noted_post(handle):
        posted.set()
        return post(handle)

    worker.transport._agent.transfer = noted_post
    load = asyncio.ensure_future(worker.load(order))
    await posted.wait()
    os.kill(prefill.pid, number)
    return load


async def killed(worker: Worker, prefill: Popen[bytes], order: LoadOrder) -> None:
    begun = time.monotonic()
    load = await signal_in_mid_read(worker, prefill, order, signal.SIGKILL)
    await expect_failure(load, 60)
    print(f"noticed after {time.monotonic() - begun:.2f} s")


async def killed_before_the_first_read(worker: Worker, prefill: Popen[bytes], order: LoadOrder) -> None:
    """The control connection stands, NIXL's does not yet."""
    read = worker.transport.read

    async def read_after_death(*arguments):
        os.kill(prefill.pid, signal.SIGKILL)
        prefill.wait()
        return await read(*arguments)

    worker.transport.read = read_after_death
    await expect_failure(asyncio.ensure_future(worker.load(order)), 60)


async def stopped(worker: Worker, prefill: Popen[bytes], order: LoadOrder) -> None:
    """A peer that hangs: the load must not end while the network may still write into its blocks."""
    load = await signal_in_mid_read(worker, prefill, order, signal.SIGSTOP)
    await asyncio.sleep(4 * TIMEOUT_S)
    assert not load.done(), "the blocks would be given back while they may still be written to"
    os.kill(prefill.pid, signal.SIGCONT)
    await expect_failure(load, 60)
    for array in worker.memory.arrays.values():
        array[:] = 7
    for _ in range(1000):
        worker.transport.progress()
        await asyncio.sleep(0.001)
    assert all(np.all(array == 7) for array in worker.memory.arrays.values()), "written to after the end"


async def expect_failure(load: asyncio.Task, within_s: float) -> None:
    try:
        await asyncio.wait_for(asyncio.shield(load), within_s)
    except LoadError as error:
        print(f"failed as it should: {error}")
        return
    raise AssertionError("the load succeeded")


SCENARIOS = {"killed": killed, "killed-cold": killed_before_the_first_read, "stopped": stopped}


async def main(scenario: str) -> None:
    command = [sys.executable, "-m", "tests.vllm_plugin.kv_connector.prefill_process", str(LAYERS)]
    prefill = Popen(command, stdin=PIPE, stdout=PIPE)  # noqa: ASYNC220 (before anything runs in the loop)
    try:
        assert prefill.stdout is not None
        address = WorkerAddress(**json.loads(next(line for line in prefill.stdout if line.startswith(b"{"))))
        (memory,) = build_memories([Stage(1, LAYERS)], **BIG)
        worker = await Worker(memory, timeout_s=TIMEOUT_S).start()
        blocks, tokens = BIG["blocks"], BIG["blocks"] * BIG["block_tokens"]
        offer = make_offer([address], range(blocks), tokens, BIG["block_tokens"])
        order = LoadOrder("request", offer, 0, tokens, tuple(reversed(range(blocks))), BIG["block_tokens"])
        if scenario != "killed-cold":
            worker.loader.timeout_s = 60.0
            await worker.load(order)
            worker.loader.timeout_s = TIMEOUT_S
        await SCENARIOS[scenario](worker, prefill, order)
        await worker.close()
    finally:
        prefill.kill()
        prefill.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
