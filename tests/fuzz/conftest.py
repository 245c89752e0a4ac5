"""A coordinator before emulated engines in a thread of its own, for tests that are not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from hexgen2.emulator import EmulatorConfig, LinearTiming
from tests.coordinator.conftest import Stand, running
from tests.waiting import HUNG_S

# No answer may be so long, of whatever `max_tokens`, that it meets the time limit of a request.
SHORT = EmulatorConfig(timing=LinearTiming(0.0, step_base_s=0.0005), max_model_len=1024)


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    loop = asyncio.new_event_loop()
    made: list[Stand] = []
    ready, done = threading.Event(), asyncio.Event()

    async def serve() -> None:
        try:
            async with running({"p0>d0": 0.5, "c0": 0.5}, emulator=SHORT) as found:
                made.append(found)
                ready.set()
                await done.wait()
        finally:
            ready.set()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="stand")
    thread.start()
    ready.wait(HUNG_S)
    yield made[0]
    loop.call_soon_threadsafe(done.set)
    thread.join(HUNG_S)
    loop.close()
