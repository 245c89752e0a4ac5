"""A thread with an event loop, for work beside vLLM's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines on one daemon thread. `on_start` is called on it first."""

    def __init__(self, name: str, on_start: Callable[[], None] | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self._on_start = on_start
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        if self._on_start is not None:
            self._on_start()
        self.loop.run_forever()
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run to the end and return the result; TimeoutError after `timeout_s`."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start, do not wait."""
        asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call on the thread, do not wait."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the loop; what still runs on it is cancelled."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.loop.close()
