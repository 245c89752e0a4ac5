"""What may be chosen about the engines beyond what the plan says."""

from __future__ import annotations

import secrets
import sys
from typing import Literal

from pydantic import Field

from hexgen2.cost.memory import Settings
from hexgen2.specs.base import Spec

_PLANNED = Settings()


class EngineOptions(Spec):
    """Settings of the engines. None means: derived from the plan's devices and the model.

    The defaults of the first block are the ones that the cost model plans with
    (`hexgen2.cost.memory.Settings`): change them here and there alike, or the engines have less room than the
    plan counts on.
    """

    memory_utilisation: float = Field(default=_PLANNED.memory_utilisation, gt=0, le=1)
    token_budget: int = Field(default=_PLANNED.token_budget, ge=1, description="tokens of one iteration")
    block_size: int | None = Field(default=None, ge=1, description="tokens of a KV block")

    dtype: str | None = None
    kv_cache_dtype: str | None = None
    attention_backend: str | None = None
    max_model_len: int | None = Field(default=None, ge=1, description="longest prompt + answer, in tokens")
    connector: Literal["auto", "pull", "push", "hexgen"] = "auto"
    """How KV caches travel; see `deploy.kv_transfer`."""
    load_failure_policy: Literal["fail", "recompute"] = "fail"
    """What a decode engine does when a KV cache does not arrive: fail the request, so that the coordinator
    can try another route, or compute the prompt itself, which hides the fault and slows the other
    requests."""

    cpu_kv_cache_limit: int = Field(
        default=256 * 2**20, ge=1, description="bytes of KV cache per CPU rank, at most"
    )
    """vLLM touches its whole KV cache at start, so an engine on a CPU takes these bytes whether it uses them
    or not. 32,768 tokens of the shipped model fit in the default."""

    python: str = Field(default_factory=lambda: sys.executable)
    run_id: str | None = Field(default_factory=lambda: secrets.token_hex(4))
    """Part of every engine's NIXL identity. Engines remember the memory layout of the engines they have met
    by that identity, so an engine that is started again must have another one. None, where something else
    than HexGen-2 may start engines again: vLLM draws a fresh identity at each start (not in a group of several
    processes, which must share one and then keep it)."""
    extra_arguments: tuple[str, ...] = Field(default=(), description="passed to every engine as they are")
