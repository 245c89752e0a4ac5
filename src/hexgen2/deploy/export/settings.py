"""What may be chosen about an export."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from hexgen2 import __version__
from hexgen2.deploy.options import EngineOptions
from hexgen2.specs.base import Spec


class ExportSettings(Spec):
    """``api_keys`` is the text of a key file (one key a line): it becomes a file or a secret of the export.
    ``addresses`` go before the hosts of the cluster file, by node."""

    name: str = Field(default="hexgen2", description="prefix of what the export creates")
    host: str = Field(default="127.0.0.1", description="address of the endpoint (shell and Compose)")
    port: int = Field(default=8000, ge=1, le=65535, description="port of the endpoint")
    first_port: int = Field(default=20_000, ge=1, le=60_000, description="engines' ports count up from here")
    addresses: dict[str, str] = Field(default_factory=dict)
    api_keys: str | None = None

    python: str = Field(default_factory=lambda: sys.executable, description="interpreter of the shell export")
    image: str = Field(default=f"hexgen2:{__version__}", description="container image with HexGen-2 and vLLM")
    pin: Literal["type", "node"] = Field(
        default="type", description="what a pod asks of its machine: a GPU type, or a node of the plan"
    )
    api_key_secret: str | None = Field(
        default=None, description="an existing secret whose `api-keys` holds the keys (Kubernetes)"
    )
    model_claim: str | None = Field(
        default=None, description="a volume claim with the model, or for the hub's cache (Kubernetes)"
    )

    def engine_options(self, python: str) -> EngineOptions:
        """Engines are started again by others than us, so each draws its identity itself."""
        return EngineOptions(python=python, run_id=None)


CONTAINER_PYTHON = "python3"
