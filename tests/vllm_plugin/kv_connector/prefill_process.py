"""A prefill worker in a process of its own, for the tests that kill or stop it.

It prints one JSON line (its address) and then serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

from tests.vllm_plugin.kv_connector.layouts import Stage, build_memories
from tests.vllm_plugin.kv_connector.workers import Worker

BIG = {"kv_heads": 4, "channels": 64, "blocks": 32, "block_tokens": 128}
"""256 KiB a block and layer."""


async def main(layers: int) -> None:
    (memory,) = build_memories([Stage(1, layers)], **BIG)
    worker = await Worker(memory).start()
    await worker.server.order(1, "request", 120.0)
    print(json.dumps(asdict(worker.address)), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
