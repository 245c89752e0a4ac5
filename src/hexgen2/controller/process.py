"""Work of seconds in a process of its own, so that the coordinator's event loop goes on."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Generic, TypeVar

from hexgen2.deploy.guard import PR_SET_PDEATHSIG

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class OtherProcess(Generic[Task, Answer]):
    """Works tasks out one by one. The process starts with the first task and ends with `close`, or with the
    process that asked, however that ends."""

    def __init__(self, work: Callable[[Task], Answer]) -> None:
        self._work = work
        self._pool: ProcessPoolExecutor | None = None

    async def __call__(self, task: Task) -> Answer:
        """BrokenProcessPool where the process dies over it; the next task starts another one."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_bind, initargs=(os.getpid(),)
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._work, task)
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _bind(parent: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all, to the parent; and die with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
