"""What passes between the scheduler's half of the connector and the workers', inside one engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from hexgen2.vllm_plugin.kv_connector.leases import LeaseOrder
from hexgen2.vllm_plugin.kv_connector.loader import LoadOrder
from hexgen2.vllm_plugin.kv_connector.params import WorkerAddress
from hexgen2.vllm_plugin.kv_connector.streams import StreamEnd, StreamStep


@dataclass
class HexgenMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Orders of one engine step."""

    leases: list[LeaseOrder] = field(default_factory=list)
    loads: list[LoadOrder] = field(default_factory=list)
    steps: list[StreamStep] = field(default_factory=list)
    ends: list[StreamEnd] = field(default_factory=list)


@dataclass
class HexgenHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Where a worker's control server listens."""

    address: WorkerAddress
