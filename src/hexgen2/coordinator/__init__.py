"""The front door: an OpenAI-compatible server that sends each request along the plan's routes."""

from hexgen2.coordinator.config import CoordinatorConfig, EngineEndpoint, Limits, RouteShare, Timeouts

__all__ = ["CoordinatorConfig", "EngineEndpoint", "Limits", "RouteShare", "Timeouts"]
