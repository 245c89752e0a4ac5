"""Ports for engines: found free on this machine, or counted up from a given one for other machines."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from hexgen2.specs.errors import InputError

PortSource = Callable[[str], int]
"""Given a host, a port on it that was not given before."""

LOWEST = 20_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def counted_ports(first: int) -> PortSource:
    """Ports counted up from ``first``, on each host by itself: known before anything runs, so fit for
    exports."""
    following: dict[str, int] = {}

    def port(host: str) -> int:
        following[host] = following.get(host, first - 1) + 1
        return following[host]

    return port


def free_ports() -> PortSource:
    """Ports that are free on this machine now.

    They are taken below the range from which the kernel serves outgoing connections, so that none of those
    can grab one between now and the engine's start; the search starts at a random place, so that two
    deployments that start together seldom meet. What remains is another server that takes the same port in
    the meantime; the engine then says so in its log and its failure is reported.
    """
    candidates = _shuffled_range()
    given: set[int] = set()

    def port(host: str) -> int:
        for candidate in candidates:
            if candidate not in given and is_free(host, candidate):
                given.add(candidate)
                return candidate
        raise InputError("ports", "", f"no free port is left on {host}", "stop some servers on this machine")

    return port


def two_ports(ports: PortSource, host: str) -> tuple[int, int]:
    """A port and the next one, both from the source; what it gives on the way to them stays unused."""
    first = ports(host)
    while (following := ports(host)) != first + 1:
        first = following
    return first, following


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on this port now (one that left a moment ago does not count)."""
    with closing(_socket(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
        return True


def require_free(host: str, port: int, source: str, field: str = "") -> None:
    """InputError where a port that somebody asked for is in use."""
    if not is_free(host, port):
        raise InputError(
            source, field, f"port {port} on {host} is in use", "give another or stop what listens there"
        )


def is_this_machine(host: str) -> bool:
    """Whether an address belongs to this machine: a server could be bound to it."""
    try:
        with closing(_socket(host)) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def require_own(host: str, source: str) -> None:
    """InputError where an address that somebody asked for is not this machine's."""
    if not is_this_machine(host):
        raise InputError(
            source,
            "",
            f"{host} is no address of this machine",
            "give one that is, or leave it out for 127.0.0.1",
        )


def _socket(host: str) -> socket.socket:
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    return socket.socket(family, socket.SOCK_STREAM)


def _shuffled_range() -> Iterator[int]:
    ceiling = 32_768
    with suppress(OSError, ValueError):
        ceiling = int(_EPHEMERAL.read_text().split()[0])
    width = max(ceiling - LOWEST, 1_000)
    start = random.SystemRandom().randrange(width)
    return (LOWEST + (start + step) % width for step in range(width))
