"""The connection between the nodes: any loss ends the group at once, a goodbye ends it in order."""

from __future__ import annotations

import contextlib
import queue
import socket
import time
from collections.abc import Iterator

import pytest

from hexgen2.vllm_plugin.asymmetric import lifeline
from hexgen2.vllm_plugin.asymmetric.lifeline import FollowerLifeline, LeaderLifeline, Lifeline
from tests.waiting import HUNG_S

SOON_S = HUNG_S
SILENCE_S = 0.6


class Loss(queue.Queue[str]):
    """Collects what `on_lost` is told."""

    def told(self) -> str:
        return self.get(timeout=SOON_S)

    def silent(self, for_s: float) -> bool:
        time.sleep(for_s)
        return self.empty()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members beat often, and are patient unless a test says otherwise."""
    monkeypatch.setattr(lifeline, "BEAT_S", 0.05)
    monkeypatch.setattr(lifeline, "SILENCE_S", HUNG_S)
    monkeypatch.setattr(lifeline, "JOIN_S", HUNG_S)


@pytest.fixture
def no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "SILENCE_S", SILENCE_S)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "JOIN_S", 1.0)


@contextlib.contextmanager
def group(followers: int) -> Iterator[list[tuple[Lifeline, Loss]]]:
    """A leader and its followers, joined."""
    losses = [Loss() for _ in range(followers + 1)]
    leader = LeaderLifeline(("127.0.0.1", 0), followers + 1, "same", losses[0].put)
    members: list[Lifeline] = [leader]
    try:
        for node in range(1, followers + 1):
            members.append(FollowerLifeline(leader.address, node, "same", losses[node].put))
        yield list(zip(members, losses, strict=True))
    finally:
        for member in members:
            member.close(orderly=False)


def longest_pause(for_s: float) -> float:
    """For how long at most this process stood still meanwhile, in seconds."""
    began = looked = time.monotonic()
    longest = 0.0
    while looked - began < for_s:
        time.sleep(0.01)
        before, looked = looked, time.monotonic()
        longest = max(longest, looked - before)
    return longest


@pytest.mark.usefixtures("no_silence")
def test_nothing_is_lost_while_all_live() -> None:
    for _ in range(10):
        with group(2) as members:
            paused_s = longest_pause(2.5 * SILENCE_S)
            lost = [loss for _, loss in members if not loss.empty()]
        if not lost:
            return
        # A machine that holds the whole process up is silent indeed; that says nothing.
        assert paused_s > SILENCE_S / 4, lost[0].get()
    pytest.skip("this machine holds processes up again and again")


def test_a_dead_leader_is_noticed_by_every_follower() -> None:
    with group(2) as members:
        members[0][0].close(orderly=False)  # as the kernel does for a killed process
        assert "the leader is gone" in members[1][1].told()
        assert "the leader is gone" in members[2][1].told()
        assert not members[1][0].orderly
        assert members[0][1].empty()


def test_a_dead_follower_is_noticed_by_the_leader_and_through_it_by_the_others() -> None:
    with group(2) as members:
        members[2][0].close(orderly=False)
        assert "node 2" in members[0][1].told()
        assert "the leader" in members[1][1].told()


def test_a_goodbye_is_orderly() -> None:
    with group(1) as members:
        members[0][0].close(orderly=True)
        assert "the leader ends" in members[1][1].told()
        assert members[1][0].orderly


def test_each_side_is_told_once() -> None:
    with group(1) as members:
        members[0][0].close(orderly=True)
        members[0][0].close(orderly=False)
        members[1][1].told()
        members[1][0].close(orderly=False)
        assert members[1][1].silent(0.3)


@pytest.mark.usefixtures("no_silence")
def test_silence_counts_as_death() -> None:
    loss = Loss()
    leader = LeaderLifeline(("127.0.0.1", 0), 2, "same", loss.put)
    with socket.create_connection(leader.address) as mute:
        mute.sendall(b'{"node": 1, "digest": "same"}\n')
        assert "node 1 has been silent" in loss.told()


@pytest.mark.usefixtures("no_waiting")
def test_a_follower_that_never_comes_ends_the_leader() -> None:
    loss = Loss()
    LeaderLifeline(("127.0.0.1", 0), 3, "same", loss.put)
    assert "nodes [1, 2] did not join" in loss.told()


@pytest.mark.usefixtures("no_waiting")
def test_a_leader_that_never_comes_fails_the_follower() -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match="there is no leader at"):
            FollowerLifeline(taken.getsockname(), 1, "same", Loss().put)


@pytest.mark.parametrize(
    ("node", "digest", "reason"),
    [
        (1, "other", "another layout, model or version"),
        (2, "same", "node 2 is not awaited"),
        (0, "same", "not awaited"),
    ],
)
def test_a_follower_of_another_group_is_turned_away_and_the_right_one_taken(
    node: int, digest: str, reason: str
) -> None:
    loss = Loss()
    leader = LeaderLifeline(("127.0.0.1", 0), 2, "same", loss.put)
    with pytest.raises(ConnectionError, match=reason):
        FollowerLifeline(leader.address, node, digest, Loss().put)
    follower = FollowerLifeline(leader.address, 1, "same", Loss().put)
    assert loss.empty()
    follower.close(orderly=False)
    assert "node 1" in loss.told()


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"{}\n",
        b'{"node": "x", "digest": 1}\n',
        b'{"node": Infinity, "digest": 1}\n',
        b"[]\n",
    ],
)
def test_a_stranger_on_the_port_does_no_harm(noise: bytes) -> None:
    loss = Loss()
    leader = LeaderLifeline(("127.0.0.1", 0), 2, "same", loss.put)
    with socket.create_connection(leader.address) as stranger:
        stranger.sendall(noise)
        stranger.settimeout(SOON_S)
        with contextlib.suppress(OSError):  # a reset, where the leader left some of it unread
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(10) == b""
    follower = FollowerLifeline(leader.address, 1, "same", Loss().put)
    assert loss.empty()
    follower.close(orderly=False)
    leader.close(orderly=False)
