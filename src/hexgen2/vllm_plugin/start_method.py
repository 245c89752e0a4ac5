"""Start a CPU engine's processes by fork, so that torch and vLLM are imported once and their pages are
shared.

vLLM's CPU platform insists on `spawn`, whatever the user's environment says, and each spawned process then
imports torch and vLLM anew: most of a small engine's start-up time and memory.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from hexgen2.vllm_plugin.compat import Reliance

START_METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"

RELIES_ON = (
    Reliance("vllm.platforms.cpu", "CpuPlatform.check_and_update_config", ("vllm_config",)),
    Reliance("vllm.utils.system_utils", "get_mp_context", ()),
)


def install() -> None:
    """Set the start method back to fork after the platform's check has set it to spawn.

    Forking is safe only while no OpenMP pool has run in the parent (libgomp's does not survive a fork), so
    nothing happens unless the environment limits OpenMP to one thread.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    @functools.wraps(original)
    def check_and_update_config(vllm_config: Any) -> None:
        original(vllm_config)
        if os.environ.get("OMP_NUM_THREADS") == "1":
            os.environ[START_METHOD_VARIABLE] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)
