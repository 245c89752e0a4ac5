"""What a worker is told when it starts, as its first message: keys never stand in its arguments."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from hexgen2.coordinator.auth import ApiKeys
from hexgen2.coordinator.config import CoordinatorConfig
from hexgen2.coordinator.tls import Tls
from hexgen2.coordinator.tracing import Tracing


class WorkerSettings(BaseModel):
    """`owner`: the Unix socket at which the owner answers what is not generation. Of `config`, engines and
    routes are not used: the owner tells them as they are."""

    model_config = ConfigDict(frozen=True)

    config: CoordinatorConfig
    owner: Path
    key_digests: tuple[str, ...] | None
    key_files: tuple[Path, ...]
    tls_files: tuple[Path, Path] | None
    otlp_traces_endpoint: str | None
    log_level: str
    log_json: bool

    def keys(self) -> ApiKeys | None:
        if self.key_digests is None:
            return None
        return ApiKeys.of_digests(map(bytes.fromhex, self.key_digests), self.key_files)

    def tls(self) -> Tls | None:
        return None if self.tls_files is None else Tls(*self.tls_files)

    def tracing(self) -> Tracing:
        return Tracing.to_endpoint(self.otlp_traces_endpoint)

    def for_one_of(self, number: int) -> WorkerSettings:
        """With one worker's part of what each of them bounds by itself."""
        limits = self.config.limits
        bodies = max(limits.max_body_bytes, limits.max_bodies_bytes // number)
        limits = limits.model_copy(update={"max_bodies_bytes": bodies})
        return self.model_copy(update={"config": self.config.model_copy(update={"limits": limits})})
