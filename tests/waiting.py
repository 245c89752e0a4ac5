"""Waiting for a state of live parts.

Tests wait for states, never for times: how fast the machine is, and which process comes first, must not matter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

HUNG_S = 60.0
"""What has not come about by then never will. No property of the code: a machine that is held up for some
seconds must not fail a test."""


async def until(condition: Callable[[], bool], within_s: float = HUNG_S, every_s: float = 0.005) -> float:
    """Wait until it holds; the seconds that took. TimeoutError, which fails the test, after ``within_s``."""

    async def asked() -> bool:
        return condition()

    return await until_answered(asked, within_s, every_s)


async def until_answered(
    condition: Callable[[], Awaitable[bool]], within_s: float = HUNG_S, every_s: float = 0.005
) -> float:
    """The same for a condition that has to be asked for."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        # Polled: what is waited for is a state of the code under test, which raises no event for its tests.
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(every_s)
    return time.monotonic() - began
