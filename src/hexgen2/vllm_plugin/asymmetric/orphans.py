"""End a process whose parent died, or that cannot end by itself.

vLLM's workers learn of their engine core's death through a pipe, but one that waits inside a collective for a
peer that is gone never looks; and an engine core does not notice when its API server is killed at all.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

POLL_S = 0.5

logger = logging.getLogger("vllm.hexgen2")


def end_with_parent(grace_s: float) -> threading.Thread:
    """Watch the parent from a daemon thread; once it is gone, end this process.

    First by SIGTERM, then for good where it is still there `grace_s` seconds later.
    """
    parent = os.getppid()
    thread = threading.Thread(target=_watch, args=(parent, grace_s), daemon=True, name="hexgen2-parent-watch")
    thread.start()
    return thread


def _watch(parent: int, grace_s: float) -> None:
    # The parent's id changes as soon as it is dead; a pipe to it would be held open by forked siblings.
    while os.getppid() == parent:
        time.sleep(POLL_S)
    logger.warning("hexgen2: process %d ends, since its parent %d is gone", os.getpid(), parent)
    os.kill(os.getpid(), signal.SIGTERM)
    _end(grace_s)


def end_after(grace_s: float) -> None:
    """End this process for good, unless it ends by itself within `grace_s` seconds."""
    thread = threading.Thread(target=_end, args=(grace_s,), daemon=True, name="hexgen2-end")
    thread.start()


def _end(grace_s: float) -> None:
    time.sleep(grace_s)
    os._exit(1)
