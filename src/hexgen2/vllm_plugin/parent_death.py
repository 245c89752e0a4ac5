"""Let a vLLM process that multiprocessing started die with the process that started it.

An engine core whose API server was killed by SIGKILL may live on, hold its device, and answer nobody. The
launcher's guard cleans up behind an API server; this covers the case that the guard itself was killed: the
kernel then kills the API server, and with it, process by process, all below.

The kernel sends the signal when the parent's *thread* that forked ends. vLLM forks engine cores and workers
in main threads, so that is the end of the parent.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

from hexgen2.vllm_plugin.compat import Reliance

RELIES_ON: tuple[Reliance, ...] = ()

PR_SET_PDEATHSIG = 1


def install() -> None:
    """Bind this process to its parent if multiprocessing started it, and all that it forks to itself."""
    if multiprocessing.parent_process() is not None:
        _die_with_parent()
    os.register_at_fork(after_in_child=_die_with_parent)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
