"""The local launcher, on small fake engines: ready, slow, dying, stubborn, and abandoned by their launcher."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hexgen2.deploy import Deployment, EngineFailed, LocalLauncher, Progress, free_ports
from hexgen2.deploy.ports import is_free
from hexgen2.deploy.processes import GRACE_S
from hexgen2.specs import InputError
from tests.waiting import HUNG_S, until

from .family import FAKE, Family, crash, deployment, holding


async def test_engines_become_ready_with_progress_and_leave(tmp_path: Path, family: Family) -> None:
    events: list[Progress] = []
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(deployment(family, "slow", "family"))
        await launcher.wait_ready(60, events.append)
        family.wait_for(4)
        assert len(family.alive()) == 4
        begun = time.monotonic()
    assert time.monotonic() - begun < GRACE_S, "engines that heed SIGTERM need no grace time"
    assert not family.alive()
    ready = [event for event in events if event.ready]  # there are signs of life between where it takes long
    assert [(event.ready_count, event.total) for event in ready] == [(1, 2), (2, 2)]
    assert {event.process for event in ready} == {"e0", "e1"}
    assert 0 < ready[0].elapsed_s <= ready[1].elapsed_s
    assert "starting" in (tmp_path / "run" / "e0.log").read_text()
    saved = Deployment.model_validate_json((tmp_path / "run" / "deployment.json").read_text())
    assert [spec.name for spec in saved.processes] == ["e0", "e1"]


async def test_a_death_at_start_up_is_told_with_its_cause(tmp_path: Path, family: Family) -> None:
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(deployment(family, "family", "dies"))
        with pytest.raises(EngineFailed) as caught:
            await launcher.wait_ready(60)
    assert caught.value.process == "e1"
    assert caught.value.cause == ("ValueError: no such model",)
    assert "exit code 3" in str(caught.value)
    assert str(tmp_path / "run" / "e1.log") in str(caught.value)
    assert not family.alive(), "the others are stopped with it"


async def test_a_rank_without_a_server_that_dies_is_told_too(tmp_path: Path, family: Family) -> None:
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(deployment(family, "silent", "!dies"))
        with pytest.raises(EngineFailed, match="engine e1"):
            await launcher.wait_ready(60)


async def test_an_engine_that_is_never_ready_is_told(tmp_path: Path, family: Family) -> None:
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(deployment(family, "silent"))
        await until(lambda: "starting" in launcher.log_of("e0").read_text())
        with pytest.raises(EngineFailed, match=r"e0 was not ready within 1 s\n  starting"):
            await launcher.wait_ready(1)
    assert not family.alive()


async def test_a_later_death_is_seen_and_its_orphans_die(tmp_path: Path, family: Family) -> None:
    async with LocalLauncher(tmp_path / "run") as launcher:
        spec = deployment(family, "family", "orphaning")
        await launcher.start(spec)
        await launcher.wait_ready(60)
        family.wait_for(5)
        await asyncio.to_thread(crash, spec.processes[1])
        gone = await asyncio.wait_for(launcher.watch(), HUNG_S)
        assert (gone.process, gone.exit_code) == ("e1", 128 + signal.SIGSEGV)
        assert "killed by signal 11" in str(EngineFailed.exited(gone))
        assert len(family.alive()) == 3, "e1's stubborn child is gone, e0's processes are not"
    assert not family.alive()


async def test_stubborn_engines_are_killed_within_the_bound(tmp_path: Path, family: Family) -> None:
    async with LocalLauncher(tmp_path / "run", grace_s=0.5) as launcher:
        await launcher.start(deployment(family, "stubborn"))
        await launcher.wait_ready(60)
        family.wait_for(5)
        begun = time.monotonic()
    assert 0.5 <= time.monotonic() - begun < GRACE_S
    assert not family.alive()


async def test_an_exception_and_a_cancellation_leave_nothing(tmp_path: Path, family: Family) -> None:
    async def serve() -> None:
        async with LocalLauncher(tmp_path / "run") as launcher:
            await launcher.start(deployment(family, "family"))
            await launcher.wait_ready(60)
            await launcher.watch()

    task = asyncio.create_task(serve())
    await asyncio.to_thread(family.wait_for, 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not family.alive()


async def test_stop_is_harmless_when_nothing_runs(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path / "run")
    await launcher.stop()
    await launcher.stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_launcher(tmp_path: Path, family: Family, how: signal.Signals) -> None:
    """The process that holds the launcher is killed: the guards notice and end their engines."""
    (tmp_path / "deployment.json").write_text(deployment(family, "family", "stubborn").model_dump_json())
    program = textwrap.dedent(
        f"""
        import asyncio
        from pathlib import Path
        from hexgen2.deploy import Deployment, LocalLauncher

        async def main():
            async with LocalLauncher(Path({str(tmp_path / "run")!r}), grace_s=0.5) as launcher:
                text = Path({str(tmp_path / "deployment.json")!r}).read_text()
                await launcher.start(Deployment.model_validate_json(text))
                await launcher.wait_ready(60)
                print("ready", flush=True)
                await launcher.watch()

        asyncio.run(main())
        """
    )
    with holding(program, family, 8) as holder:
        holder.send_signal(how)
        holder.wait(HUNG_S)
        assert family.gone(), f"left: {family.alive()}"


HEIR = """
import os, socket, sys, threading, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
if os.fork() == 0:
    memory = bytearray(300 << 20)
    memory[::4096] = b"x" * (300 << 8)
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    print("up", flush=True)
time.sleep(600)
"""


def test_a_port_that_a_killed_child_inherited_is_free_when_the_guard_leaves() -> None:
    """As vLLM's engine core inherits its server's: it looks dead while its memory is still taken down."""
    guard = sys.modules["hexgen2.deploy.guard"]
    for _ in range(5):
        port = free_ports()("127.0.0.1")
        command = [sys.executable, "-I", "-S", str(guard.__file__), "1", "--", sys.executable, "-c", HEIR]
        with subprocess.Popen(
            [*command, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            for pid in guard.descendants(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait(HUNG_S)
            assert is_free("127.0.0.1", port)


def test_what_only_the_kernel_can_end_when_the_guard_is_killed(family: Family) -> None:
    """`kill -9` on a guard ends the engine's first process, and no more: the documented limit."""
    guard = Path(sys.modules["hexgen2.deploy.guard"].__file__ or "")
    command = [sys.executable, "-I", "-S", str(guard), "1", "--"]
    engine = [sys.executable, str(FAKE), "1", "silent", family.path]
    with subprocess.Popen([*command, *engine], stdin=subprocess.PIPE) as process:
        family.wait_for(1)
        process.kill()
        assert family.gone()


def test_what_left_while_its_guard_was_held_up_was_not_killed(tmp_path: Path) -> None:
    """The engine leaves on SIGTERM, and the guard, which stands still, looks only when the grace is over."""
    for grace_s in (2.0, 8.0, 32.0):  # a machine may be held up for longer than a grace: then it says nothing
        folder = tmp_path / str(grace_s)
        folder.mkdir()
        in_time, code = _left_while_the_guard_stood_still(Family(folder), grace_s)
        if in_time:
            break
    assert in_time, "this machine was held up three times"
    assert code == 128 + signal.SIGTERM


def _left_while_the_guard_stood_still(family: Family, grace_s: float) -> tuple[bool, int]:
    """Whether the guard stood still before the grace was over, and its exit code."""
    guard = Path(sys.modules["hexgen2.deploy.guard"].__file__ or "")
    command = [sys.executable, "-I", "-S", str(guard), str(grace_s), "--"]
    engine = [sys.executable, str(FAKE), "1", "silent", family.path]
    with subprocess.Popen([*command, *engine], stdin=subprocess.PIPE) as process:
        family.wait_for(1)
        (pid,) = family.pids()
        os.kill(pid, signal.SIGSTOP)
        asyncio.run(until(lambda: "stopped" in status(pid)["State"]))
        process.terminate()
        begun = time.monotonic()
        asyncio.run(until(lambda: pends(pid, signal.SIGTERM), every_s=0.001))
        process.send_signal(signal.SIGSTOP)
        in_time = time.monotonic() - begun < grace_s / 2
        os.kill(pid, signal.SIGCONT)
        assert family.gone()
        time.sleep(grace_s)
        process.send_signal(signal.SIGCONT)
        return in_time, process.wait(HUNG_S)


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def pends(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that stands still."""
    return any(int(status(pid)[mask], 16) >> (number - 1) & 1 for mask in ("SigPnd", "ShdPnd"))


async def test_a_command_that_is_not_there(tmp_path: Path, family: Family) -> None:
    spec = deployment(family, "silent")
    missing = spec.processes[0].model_copy(update={"argv": ("no-such-command",)})
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(spec.model_copy(update={"processes": (missing,)}))
        with pytest.raises(EngineFailed, match="no-such-command: No such file or directory"):
            await launcher.wait_ready(60)


async def test_another_machines_node_is_refused(tmp_path: Path, family: Family) -> None:
    launcher = LocalLauncher(tmp_path / "run")
    with pytest.raises(InputError, match=r"node n0: is at 192\.0\.2\.1.*--launcher ray"):
        await launcher.start(deployment(family, "family", host="192.0.2.1"))
    assert not family.pids()


async def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path, family: Family) -> None:
    spec = deployment(family, "family", "family")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = spec.processes[1].ports["http"]
        listener.bind(("127.0.0.1", port))
        listener.listen()
        with pytest.raises(InputError, match=f"engine e1: http: port {port} on 127.0.0.1 is in use"):
            await LocalLauncher(tmp_path / "run").start(spec)
    assert not family.pids()


async def test_a_run_folder_that_cannot_be_made(tmp_path: Path, family: Family) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        await LocalLauncher(tmp_path / "file" / "run").start(deployment(family, "family"))


async def test_variables_are_set_and_taken_away(
    tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEXGEN2_UNWANTED", "1")
    spec = (
        deployment(family, "silent")
        .processes[0]
        .model_copy(
            update={
                "argv": (
                    sys.executable,
                    "-c",
                    "import os; print({k: v for k, v in os.environ.items() if 'HEXGEN2' in k})",
                ),
                "unset": ("HEXGEN2_UNWANTED",),
            }
        )
    )
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(deployment(family, "silent").model_copy(update={"processes": (spec,)}))
        assert (await asyncio.wait_for(launcher.watch(), HUNG_S)).exit_code == 0
    assert (tmp_path / "run" / "e0.log").read_text() == "{'HEXGEN2_TEST': '1'}\n"


async def test_a_group_of_several_processes_is_ended_and_started_as_a_whole(
    tmp_path: Path, family: Family
) -> None:
    spec = deployment(family, "family", "!silent", "orphaning")
    head, rank, other = spec.processes
    group = {"group_id": "e0"}
    spec = spec.model_copy(
        update={"processes": (head.model_copy(update=group), rank.model_copy(update=group), other)}
    )
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(spec)
        await launcher.wait_ready(60)
        family.wait_for(6)
        before = launcher.pids()
        watch = asyncio.create_task(launcher.watch("e0"))
        await asyncio.to_thread(crash, other)  # another group's end
        assert (await asyncio.wait_for(launcher.watch(), HUNG_S)).process == "e2"
        assert not watch.done()
        await launcher.end_group("e0")
        assert not launcher.pids()
        await launcher.start_group("e0")
        await launcher.wait_ready(60, groups=("e0",))
        after = launcher.pids()
        assert before["e0"] != after["e0"]
        assert before["e1"] != after["e1"]
        assert launcher.log_of("e0") == tmp_path / "run" / "e0.again1.log"
        assert "starting" in launcher.log_of("e0").read_text()
        watch.cancel()
        os.kill(after["e1"], signal.SIGTERM)
        gone = await asyncio.wait_for(launcher.watch("e0"), HUNG_S)
        assert (gone.process, gone.log.name) == ("e1", "e1.again1.log")
    assert not family.alive()


async def test_a_group_whose_port_was_taken_meanwhile_is_not_started(tmp_path: Path, family: Family) -> None:
    spec = deployment(family, "family")
    async with LocalLauncher(tmp_path / "run") as launcher:
        await launcher.start(spec)
        await launcher.wait_ready(60)
        await launcher.end_group("e0")
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", spec.processes[0].ports["http"]))
            listener.listen()
            with pytest.raises(InputError, match="is in use"):
                await launcher.start_group("e0")
