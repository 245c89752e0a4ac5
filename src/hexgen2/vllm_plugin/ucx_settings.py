"""Give UCX the project's defaults in every process of vLLM, so that its own NIXL connectors have them too."""

from __future__ import annotations

import os

from hexgen2.specs.ucx import set_ucx_defaults
from hexgen2.vllm_plugin.compat import Reliance

RELIES_ON: tuple[Reliance, ...] = ()


def install() -> None:
    set_ucx_defaults(os.environ)
