"""What holds a process on its node, without Ray around it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from hexgen2.deploy import ProcessSpec, free_ports
from hexgen2.deploy.raycluster import actor as module
from hexgen2.deploy.raycluster.actor import ProcessActor
from tests.waiting import HUNG_S

from ..family import Family, deployment


def holding(spec: ProcessSpec, **carried: str) -> ProcessActor:
    return ProcessActor(spec.model_dump_json(), 0.5, "/the/driver's/python", carried)


def running(family: Family, program: str, **fields: object) -> ProcessSpec:
    spec = deployment(family, "silent").processes[0]
    return spec.model_copy(update={"argv": ("/the/driver's/python", "-c", program), "ports": {}, **fields})


async def told(actor: ProcessActor) -> tuple[bytes, int, int]:
    """All output that was kept, where it began, and the exit code."""
    parts, seen, first = b"", 0, None
    while True:
        begin, output, code = await actor.news(seen, 5.0)
        first = begin if first is None else first
        parts, seen = parts + output, begin + len(output)
        if code is not None:
            return parts, first, code


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_assigned", list)


async def test_output_and_exit_code_are_told(family: Family) -> None:
    actor = holding(running(family, "print('one'); print('two'); raise SystemExit(7)"))
    assert await actor.start() is None
    assert await told(actor) == (b"one\ntwo\n", 0, 7)


async def test_what_was_not_seen_is_told_again(family: Family) -> None:
    actor = holding(running(family, "import os, time; os.write(1, b'abc\\n'); time.sleep(600)"))
    assert await actor.start() is None
    assert await actor.news(0, HUNG_S) == (0, b"abc\n", None)
    assert await actor.news(0, 1.0) == (0, b"abc\n", None), "the answer may have been lost on its way"
    assert await actor.news(4, 0.01) == (4, b"", None)
    await actor.end()
    assert (await told(actor))[2] == 128 + 15


async def test_output_that_nobody_fetches_is_bounded(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 1000)
    actor = holding(running(family, "print('x' * 200_000, end='end')"))
    assert await actor.start() is None
    assert actor._process is not None
    await asyncio.wait_for(actor._process.wait(), HUNG_S)
    output, begin, code = await told(actor)
    assert (output[-3:], begin + len(output), code) == (b"end", 200_003, 0)
    assert len(output) <= 1000


async def test_variables_come_from_the_node_then_the_driver(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"VLLM_A": "node", "RAY_X": "1", "OMP_NUM_THREADS": "9", "VLLM_GONE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_assigned", lambda: ["3", "5"])
    names = ("VLLM_A", "VLLM_B", "RAY_X", "OMP_NUM_THREADS", "VLLM_GONE", "CUDA_VISIBLE_DEVICES")
    program = f"import os; print(*(os.environ.get(name) for name in {names!r}))"
    env = {"CUDA_VISIBLE_DEVICES": "0,1"}
    actor = holding(
        running(family, program, env=env, unset=("VLLM_GONE",)), VLLM_A="driver", VLLM_B="driver", VLLM_GONE="2"
    )
    assert await actor.start() is None
    assert (await told(actor))[0] == b"node driver None None None 3,5\n"


async def test_a_port_that_is_in_use_is_told(family: Family) -> None:
    spec = deployment(family, "silent").processes[0]
    port = free_ports()("127.0.0.1")
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    async with server:
        problem = await holding(spec.model_copy(update={"ports": {"http": port}})).start()
    assert problem == f"its port {port} (http) on 127.0.0.1 is in use"
    assert not family.pids()


async def test_files_are_in_its_folder(family: Family) -> None:
    actor = holding(running(family, "print(open('plan.json').read())", files={"plan.json": "{}"}))
    assert await actor.start() is None
    assert (await told(actor))[0] == b"{}\n"


def test_the_nodes_python_takes_the_place_of_the_drivers(family: Family) -> None:
    actor = holding(running(family, ""))
    assert actor._argv[0] == sys.executable
    assert Path(actor._argv[0]).exists()
