"""What a machine has to offer, found out and written as a cluster file."""

from hexgen2.probe.cluster_file import cluster_text, document_text
from hexgen2.probe.found import Found, FoundLink, FoundNode
from hexgen2.probe.machine import Devices, probe_machine

__all__ = ["Devices", "Found", "FoundLink", "FoundNode", "cluster_text", "document_text", "probe_machine"]
