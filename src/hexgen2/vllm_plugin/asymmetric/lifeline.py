"""A connection between the nodes of a group, so that the death of one ends all.

vLLM's workers on a follower node wait for the leader's next message for ever, and its leader learns of a dead
follower only where a collective fails. So each follower holds one TCP connection to the leader, on which both
sides send a beat every second. A process that is killed has its connection closed by its kernel, which the
other side sees at once; a host that vanishes falls silent, which it sees after `SILENCE_S`. The follower's
greeting also carries a digest of what both sides must agree on, so that a follower started for another group
is turned away.

Everything here is standard library and runs in daemon threads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable

BEAT_S = 1.0
SILENCE_S = 10.0
JOIN_S = 600.0
"""How long the leader waits for its followers and a follower for its leader: people start nodes by hand."""

_BEAT, _BYE = b".", b"!"

logger = logging.getLogger("vllm.hexgen2")

OnLost = Callable[[str], None]


class Lifeline:
    """One side's view of the group.

    `on_lost` is called at most once, from a thread, with what happened; never after `close`.
    """

    def __init__(self, on_lost: OnLost) -> None:
        self._on_lost = on_lost
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.orderly = False
        """Whether the other side said goodbye."""

    def close(self, *, orderly: bool) -> None:
        """End the connections; with a goodbye where the group ends on purpose."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            sockets = list(self._sockets)
        for connection in sockets:
            if orderly:
                _send(connection, _BYE)
            _hang_up(connection)

    def _lost(self, reason: str) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            sockets = list(self._sockets)
        # First the news to the other nodes, since ending this node's part takes seconds.
        for connection in sockets:
            _hang_up(connection)
        self._on_lost(reason)

    def _keep(self, connection: socket.socket, peer: str) -> None:
        """Watch a peer that has joined."""
        connection.settimeout(BEAT_S)
        with self._lock:
            if self._closed.is_set():
                _hang_up(connection)
                return
            self._sockets.append(connection)
        name = f"hexgen2-lifeline-{peer.replace(' ', '-')}"
        threading.Thread(target=self._watch, args=(connection, peer), daemon=True, name=name).start()

    def _watch(self, connection: socket.socket, peer: str) -> None:
        """Exchange beats until the peer is lost, says goodbye, or this side closes."""
        heard = beaten = time.monotonic()
        while not self._closed.is_set():
            now = time.monotonic()
            if now - beaten >= BEAT_S:
                beaten = now
                if not _send(connection, _BEAT):
                    return self._lost(f"the connection to {peer} broke")
            try:
                data = connection.recv(64)
            except TimeoutError:
                if time.monotonic() - heard > SILENCE_S:
                    return self._lost(f"{peer} has been silent for {SILENCE_S:.0f} s")
                continue
            except OSError:
                return self._lost(f"the connection to {peer} broke")
            if not data:
                return self._lost(f"{peer} is gone")
            if _BYE in data:
                self.orderly = True
                return self._lost(f"{peer} ends")
            heard = time.monotonic()
        return None


class LeaderLifeline(Lifeline):
    """The leader's side: listens for the followers, nodes 1 to `nodes` - 1."""

    def __init__(self, address: tuple[str, int], nodes: int, digest: str, on_lost: OnLost) -> None:
        super().__init__(on_lost)
        self._nodes = nodes
        self._digest = digest
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._listener = socket.create_server(address, family=family)
        self._listener.settimeout(BEAT_S)
        self.address = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True, name="hexgen2-lifeline").start()

    def _accept(self) -> None:
        missing = set(range(1, self._nodes))
        deadline = time.monotonic() + JOIN_S
        with self._listener:
            while missing and not self._closed.is_set():
                if time.monotonic() > deadline:
                    return self._lost(f"nodes {sorted(missing)} did not join within {JOIN_S:.0f} s")
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    continue
                node = self._greet(connection, missing)
                if node is None:
                    connection.close()
                    continue
                missing.discard(node)
                self._keep(connection, f"node {node}")
        return None

    def _greet(self, connection: socket.socket, missing: set[int]) -> int | None:
        """The node that connects, or None for one that does not belong here, after telling it why."""
        connection.settimeout(SILENCE_S)
        try:
            greeting = json.loads(_line(connection))
            node, digest = int(greeting["node"]), str(greeting["digest"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None
        reason = ""
        if digest != self._digest:
            reason = "it was started with another layout, model or version"
        elif node not in missing:
            reason = f"node {node} is not awaited"
        _send(connection, json.dumps({"refused": reason}).encode() + b"\n")
        if reason:
            logger.warning("hexgen2: a follower was turned away, since %s", reason)
        return None if reason else node


class FollowerLifeline(Lifeline):
    """A follower's side.

    The constructor returns once the leader took this node in, and raises ConnectionError where it did not.
    """

    def __init__(self, address: tuple[str, int], node: int, digest: str, on_lost: OnLost) -> None:
        super().__init__(on_lost)
        leader = f"the leader at {address[0]}:{address[1]}"
        connection = _connect(address)
        connection.settimeout(SILENCE_S)
        _send(connection, json.dumps({"node": node, "digest": digest}).encode() + b"\n")
        try:
            refused = json.loads(_line(connection))["refused"]
        except (OSError, ValueError, KeyError) as error:
            refused, problem = True, f"{leader} did not answer ({error})"
        else:
            problem = f"{leader} turned this node away: {refused}"
        if refused:
            connection.close()
            raise ConnectionError(problem)
        self._keep(connection, "the leader")


def _connect(address: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            return socket.create_connection(address, timeout=SILENCE_S)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"there is no leader at {address[0]}:{address[1]} ({error})") from None
            time.sleep(BEAT_S / 2)


def _send(connection: socket.socket, data: bytes) -> bool:
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def _hang_up(connection: socket.socket) -> None:
    # Closing alone would wait for the thread that reads.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _line(connection: socket.socket, limit: int = 4096) -> bytes:
    """One line, byte by byte, so that nothing of what follows is taken; ValueError where there is none."""
    line = b""
    while len(line) < limit:
        byte = connection.recv(1)
        if not byte:
            break
        if byte == b"\n":
            return line
        line += byte
    raise ValueError("no greeting")
