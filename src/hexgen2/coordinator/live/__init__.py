"""The live page: what the service did in the last minutes, as one JSON document and as a page that shows it."""

from hexgen2.coordinator.live.live import Live
from hexgen2.coordinator.live.web import STATE, add_routes

__all__ = ["STATE", "Live", "add_routes"]
