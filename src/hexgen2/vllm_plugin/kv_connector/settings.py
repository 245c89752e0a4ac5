"""What a user may set in `kv_connector_extra_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All optional. Times in seconds."""

    host: str = ""
    """The address that peers reach this engine's workers at; empty for vLLM's own choice (VLLM_HOST_IP)."""
    port: int = 0
    """First control port: worker n of an engine listens on port + n. 0 lets the system choose."""
    lease_seconds: float = 30.0
    """How long the blocks of a prefill wait for a decode engine that does not show up."""
    transfer_timeout_seconds: float = 60.0
    """How long a transfer may take before it counts as failed."""
    begin_timeout_seconds: float = 120.0
    """How long a request that came before its prefill waits for that to begin."""
    connect_timeout_seconds: float = 5.0
    """How long the first contact with a worker may take."""
    overlap_read_bytes: int = 4 * 2**20
    """What a worker waits for before it reads from a prefill that is under way, unless it is the last part:
    smaller reads cost both sides more than they save.
    """
    backends: tuple[str, ...] = ("UCX",)
    """NIXL's backends."""

    def __post_init__(self) -> None:
        for name in (
            "lease_seconds",
            "transfer_timeout_seconds",
            "begin_timeout_seconds",
            "connect_timeout_seconds",
        ):
            if not 0 < getattr(self, name) <= 600:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0 and at most 600")
        if self.overlap_read_bytes < 1:
            raise ValueError(f"overlap_read_bytes is {self.overlap_read_bytes}, must be at least 1")
        if not 0 <= self.port < 65_536:
            raise ValueError(f"port is {self.port}, must be 0 (any) to 65535")
        if not self.backends:
            raise ValueError("backends is empty, name at least one (UCX)")


def read_settings(extra_config: Mapping[str, Any]) -> Settings:
    """Raises ValueError, one line, for a key that is not known or a value that does not fit."""
    try:
        return msgspec.convert(dict(extra_config), Settings)
    except msgspec.ValidationError as error:
        raise ValueError(f"kv_connector_extra_config: {error}") from error
