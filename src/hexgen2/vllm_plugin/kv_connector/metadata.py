"""What passes between the scheduler's half of the connector and the workers', inside one engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from hexgen2.vllm_plugin.kv_connector.loader import LoadOrder
from hexgen2.vllm_plugin.kv_connector.params import WorkerAddress


@dataclass(frozen=True)
class LeaseOrder:
    """Keep this finished request's blocks for whoever fetches them."""

    lease: int
    request: str
    duration_s: float


@dataclass
class HexgenMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Orders of one engine step."""

    leases: list[LeaseOrder] = field(default_factory=list)
    loads: list[LoadOrder] = field(default_factory=list)


@dataclass
class HexgenHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Where a worker's control server listens."""

    address: WorkerAddress
