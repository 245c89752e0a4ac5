"""What HexGen-2 adds to vLLM, loaded by vLLM itself through its `vllm.general_plugins` entry point.

The plugin does nothing unless the environment variable `HEXGEN2_VLLM_TUNING` asks for it: a vLLM that merely
shares a virtual environment with HexGen-2 is left as it came. `deploy` sets the variable to `cpu` for engines
on CPU devices and to `parent-death,ucx-settings` for others; docs/cpu-engines.md says what each tuning changes
and what was measured.

Imported only inside vLLM's processes. vLLM loads it in every one of them (API server, engine core, workers),
in some more than once, so this module must stay cheap to import and `register` may be called repeatedly.
"""

from __future__ import annotations

import os

TUNING_VARIABLE = "HEXGEN2_VLLM_TUNING"


def register() -> None:
    """Apply the tunings that the environment asks for; without the variable, return at once."""
    wanted = os.environ.get(TUNING_VARIABLE, "").strip()
    if wanted:
        from hexgen2.vllm_plugin.tunings import apply

        apply(wanted)


__all__ = ["TUNING_VARIABLE", "register"]
