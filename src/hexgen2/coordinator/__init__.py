"""The front door: an OpenAI-compatible server that sends each request along the plan's routes."""

from hexgen2.coordinator.auth import ApiKeys
from hexgen2.coordinator.config import CoordinatorConfig, EngineEndpoint, Limits, RouteShare, Timeouts
from hexgen2.coordinator.errors import WorkersFailed
from hexgen2.coordinator.kv_totals import KvTotals, kv_transfer_totals
from hexgen2.coordinator.loop import run
from hexgen2.coordinator.service import Coordinator
from hexgen2.coordinator.tls import Tls
from hexgen2.coordinator.tracing import Tracing
from hexgen2.coordinator.traffic import Listener, Served

__all__ = [
    "ApiKeys",
    "Coordinator",
    "CoordinatorConfig",
    "EngineEndpoint",
    "KvTotals",
    "Limits",
    "Listener",
    "RouteShare",
    "Served",
    "Timeouts",
    "Tls",
    "Tracing",
    "WorkersFailed",
    "kv_transfer_totals",
    "run",
]
