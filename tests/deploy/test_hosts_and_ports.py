"""Addresses of nodes, and ports on them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hexgen2.deploy import counted_ports, free_ports, require_free
from hexgen2.deploy.hosts import device_numbers, is_loopback, serving_hosts
from hexgen2.deploy.ports import LOWEST, is_free, is_this_machine
from hexgen2.specs import InputError

from .builders import cluster


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.1.1", True),
        ("localhost", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("gpu7", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_test_bed_and_a_lone_node_are_this_machine() -> None:
    assert serving_hosts(cluster(("a", "cpu-1c", 1), ("b", "cpu-1c", 1)), ["a", "b"]) == {
        "a": "127.0.0.1",
        "b": "127.0.0.1",
    }
    unused = cluster(("a", "L4", 1), ("b", "L4", 1))
    assert serving_hosts(unused, ["b"]) == {"b": "127.0.0.1"}


def test_devices_are_numbered_over_the_nodes_of_an_address() -> None:
    nodes = [
        {"name": name, "gpu": "L4", "count": count, "host": host}
        for name, count, host in (("a", 2, "h1"), ("b", 2, "h2"), ("c", 1, "h1"), ("d", 9, "h1"))
    ]
    numbers = device_numbers(cluster(*nodes), {"a": "h1", "b": "h2", "c": "h1"})
    assert numbers == {"a/0": 0, "a/1": 1, "b/0": 0, "b/1": 1, "c/0": 2}


def test_a_node_that_is_not_served_still_has_its_devices() -> None:
    nodes = [{"name": name, "gpu": "L4", "count": 2, "host": "127.0.0.1"} for name in "ab"]
    assert device_numbers(cluster(*nodes), {"b": "127.0.0.1"}) == {"b/0": 2, "b/1": 3}


def test_free_ports_are_free_distinct_and_not_ephemeral(taken: int) -> None:
    port_on = free_ports()
    ports = [port_on("127.0.0.1") for _ in range(50)]
    assert len(set(ports)) == 50
    floor = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(LOWEST <= port < max(floor, LOWEST + 1000) for port in ports)
    assert taken not in ports
    for port in ports[:5]:
        with socket.socket() as listener:
            # As servers do: a port is free though connections of one that ended lately linger on it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))


def test_counted_ports_count_on_each_host() -> None:
    port_on = counted_ports(8000)
    assert [port_on(host) for host in ("a", "a", "b", "a", "b")] == [8000, 8001, 8000, 8002, 8001]


def test_a_port_in_use_is_the_users_mistake(taken: int) -> None:
    assert not is_free("127.0.0.1", taken)
    with pytest.raises(InputError, match=f"--port: port {taken} on 127.0.0.1 is in use; give another"):
        require_free("127.0.0.1", taken, "--port")
    require_free("127.0.0.1", free_ports()("127.0.0.1"), "--port")


@pytest.mark.parametrize(
    ("host", "expected"),
    # 192.0.2.0/24 is set aside for documentation: nobody's address.
    [("127.0.0.1", True), ("localhost", True), ("192.0.2.1", False), ("no-such-host.invalid", False)],
)
def test_this_machine(host: str, expected: bool) -> None:
    assert is_this_machine(host) is expected
