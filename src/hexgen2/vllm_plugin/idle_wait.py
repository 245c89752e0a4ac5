"""Wait for the shared-memory queue asleep instead of spinning on it.

Between an engine core and its workers vLLM passes messages through shared memory. A reader that had a message
within the last second looks for the next one in a `sched_yield` loop, which is a whole core per worker and
per engine core while requests run. With more processes than cores that is time taken from the model. Each
message also rings a ZeroMQ bell, so a reader may as well sleep on that; a bell can be lost, hence the bound
on the sleep.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from hexgen2.vllm_plugin.compat import Reliance

LONGEST_WAIT_MS = 2
"""A lost bell costs a busy reader at most this; vLLM's own bound for an idle one is 5 s."""

_QUEUE = "vllm.distributed.device_communicators.shm_broadcast"

RELIES_ON = (
    Reliance(_QUEUE, "SpinCondition.wait", ("self", "timeout_ms")),
    Reliance(
        _QUEUE, "SpinCondition.__init__", ("self", "is_reader", "context", "notify_address", "busy_loop_s")
    ),
)


def install() -> None:
    """Replace the spin of `SpinCondition.wait` by a bounded wait for the bell."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    original = SpinCondition.wait

    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() > self.last_read + self.busy_loop_s:
            original(self, timeout_ms)
            return
        busy_loop_s, self.busy_loop_s = self.busy_loop_s, -1.0  # never "busy": take the branch that polls
        try:
            original(self, LONGEST_WAIT_MS if timeout_ms is None else min(timeout_ms, LONGEST_WAIT_MS))
        finally:
            self.busy_loop_s = busy_loop_s

    SpinCondition.wait = wait
