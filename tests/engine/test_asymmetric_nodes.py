"""A group on two nodes, one process each: the same tokens, and the death of any part ends all of it.

The nodes are processes on 127.0.0.1 and 127.0.0.2. A group of 2 + 1 ranks was ready after 45 to 85 s on two
cores that ten times as many processes used.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.asymmetric_engines import (
    CHUNKED,
    SERVER,
    START_S,
    Engine,
    engine,
    greedy,
    master_port,
    one_ranks_tokens,
    prompts,
    tiny_llama,
)
from tests.waiting import HUNG_S

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

GONE_S = 120.0
"""Within this nothing of the group may be left, also on a machine with many times more processes than cores."""


@contextmanager
def group(layout: str, folder: Path, *, ready: bool = True) -> Iterator[tuple[Engine, Engine]]:
    """The leader and the follower of a group on two nodes."""
    command = (*SERVER, "--layout", layout)
    nodes = ("--master-addr", "127.0.0.1", "--master-port", master_port())
    with (
        engine(command, tiny_llama(), folder / "leader", *CHUNKED, *nodes, "--node-rank", "0") as leader,
        engine(
            command,
            tiny_llama(),
            folder / "follower",
            *(*CHUNKED, *nodes, "--node-rank", "1"),
            VLLM_HOST_IP="127.0.0.2",
        ) as follower,
    ):
        if ready:
            leader.wait_ready()
        yield leader, follower


def keep_busy(leader: Engine) -> threading.Thread:
    """A request that runs for long, so that ranks are inside a step when something dies."""

    def run() -> None:
        body: dict[str, Any] = {"model": "model", "prompt": prompts()[4], "max_tokens": 600, "ignore_eos": True}
        with suppress(httpx.HTTPError, AssertionError):
            leader.post(body)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(0.5)
    return thread


def ends(leader: Engine, follower: Engine) -> None:
    """Both nodes' processes are all gone in time, and the request that ran came to an end."""
    begun = time.monotonic()
    leader.wait_gone(GONE_S)
    follower.wait_gone(max(HUNG_S, GONE_S - (time.monotonic() - begun)))


@pytest.mark.parametrize(
    "layout",
    ["2x5@0+1x3@1", pytest.param("1x2@0+2x5@1+1x1@0", marks=pytest.mark.slow)],
)
def test_tokens_equal_one_ranks_and_a_dead_follower_ends_the_group(layout: str, tmp_path: Path) -> None:
    expected = one_ranks_tokens()
    with group(layout, tmp_path) as (leader, follower):
        assert greedy(leader) == expected
        request = keep_busy(leader)
        follower.process.send_signal(signal.SIGKILL)
        ends(leader, follower)
        request.join(HUNG_S)
        assert not request.is_alive()
        assert leader.process.wait(HUNG_S) != 0


def test_a_dead_leader_ends_the_group(tmp_path: Path) -> None:
    with group("2x5@0+1x3@1", tmp_path) as (leader, follower):
        keep_busy(leader)
        leader.process.send_signal(signal.SIGKILL)
        ends(leader, follower)
        assert follower.process.wait(HUNG_S) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("node", "victim"),
    [(0, "EngineCore"), (0, "Worker_PP0_TP1"), (1, "Worker_PP1")],
    ids=lambda value: str(value),
)
def test_the_death_of_any_process_ends_the_group(node: int, victim: str, tmp_path: Path) -> None:
    with group("2x5@0+1x3@1", tmp_path) as nodes:
        keep_busy(nodes[0])
        nodes[node].named(victim).kill()
        ends(*nodes)


@pytest.mark.slow
def test_a_leader_that_is_stopped_ends_the_group_in_order(tmp_path: Path) -> None:
    with group("2x5@0+1x3@1", tmp_path) as (leader, follower):
        leader.process.terminate()
        ends(leader, follower)
        assert leader.process.wait(HUNG_S) == 0
        assert follower.process.wait(HUNG_S) == 0


@pytest.mark.slow
def test_a_follower_that_is_stopped_ends_the_group(tmp_path: Path) -> None:
    with group("2x5@0+1x3@1", tmp_path) as (leader, follower):
        follower.process.terminate()
        ends(leader, follower)


@pytest.mark.slow
def test_a_follower_that_dies_during_the_start_ends_the_group(tmp_path: Path) -> None:
    with group("2x5@0+1x3@1", tmp_path, ready=False) as (leader, follower):
        deadline = time.monotonic() + 120
        while not any("Worker" in " ".join(process.cmdline()) for process in follower.members()):
            assert time.monotonic() < deadline, follower.tail()
            time.sleep(0.1)
        follower.process.send_signal(signal.SIGKILL)
        ends(leader, follower)
        assert leader.process.wait(HUNG_S) != 0


def test_a_follower_with_another_layout_is_turned_away_in_one_line(tmp_path: Path) -> None:
    port = master_port()
    nodes = ("--master-addr", "127.0.0.1", "--master-port", port)
    first = engine(
        (*SERVER, "--layout", "2x5@0+1x3@1"),
        tiny_llama(),
        tmp_path / "leader",
        *CHUNKED,
        *nodes,
        "--node-rank",
        "0",
    )
    other = engine(
        (*SERVER, "--layout", "2x4@0+1x4@1"),
        tiny_llama(),
        tmp_path / "follower",
        *CHUNKED,
        *nodes,
        "--node-rank",
        "1",
    )
    with first, other as follower:
        assert follower.process.wait(START_S) == 2
        told = [line for line in follower.tail().splitlines() if "turned this node away" in line]
        assert len(told) == 1
        assert "it was started with another layout, model or version" in told[0]
