"""What a probe runs on each node of a Ray cluster.

Nothing of the serving parts is imported here: they draw in OR-Tools, and NIXL, which measures links, crashes
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from hexgen2.calibrate.links import LinkFit, Transport, fit_link, measure, serving
from hexgen2.probe.found import Found
from hexgen2.probe.machine import Devices, probe_machine


def describe(devices: Devices, cpu_devices: int | None, name: str, host: str) -> Found:
    """This node."""
    return probe_machine(devices, cpu_devices, name, host)


def has_nixl() -> bool:
    """Whether NIXL is installed here."""
    import importlib.util

    return importlib.util.find_spec("nixl") is not None


class LinkEnd:
    """One end of the links of a node: others read from it, and it reads from others."""

    def __init__(self, host: str) -> None:
        self._stack = ExitStack()
        self._port = self._stack.enter_context(serving(host))

    def port(self) -> int:
        """Where others read."""
        return self._port

    def read(self, host: str, port: int, transport: Transport, sizes: Sequence[int]) -> LinkFit:
        """Measure the link from another end to here."""
        return fit_link(measure(host, port, transport, sizes))
