"""What each tuning does to the thing it replaces, on stand-ins with vLLM's shapes."""

from __future__ import annotations

import enum
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import Any

import pytest

from hexgen2.vllm_plugin import idle_wait, nixl_affinity, nixl_progress, pipeline_buffers, start_method
from tests.waiting import HUNG_S

from .conftest import FakeModule

VARIABLE = start_method.START_METHOD_VARIABLE


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


@pytest.mark.parametrize(("threads", "expected"), [("1", "fork"), ("2", "spawn"), (None, "spawn")])
def test_fork_only_where_openmp_has_one_thread(
    fake_module: FakeModule, monkeypatch: pytest.MonkeyPatch, threads: str | None, expected: str
) -> None:
    checked: list[object] = []

    class CpuPlatform:
        @classmethod
        def check_and_update_config(cls, vllm_config: object) -> None:
            checked.append(vllm_config)
            os.environ[VARIABLE] = "spawn"

    fake_module("vllm.platforms.cpu", CpuPlatform=CpuPlatform)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    start_method.install()
    CpuPlatform.check_and_update_config("config")
    assert checked == ["config"]
    assert os.environ[VARIABLE] == expected


class Factory:
    """vLLM's connector factory; `make` stands for a connector's constructor."""

    make: Any = None

    @classmethod
    def create_connector(cls, config: object, role: Role, kv_cache_config: object) -> Any:
        return cls.make(config, role, kv_cache_config)


@pytest.fixture
def factory(fake_module: FakeModule) -> type[Factory]:
    fresh = type("KVConnectorFactory", (Factory,), {})
    root = "vllm.distributed.kv_transfer.kv_connector"
    fake_module(f"{root}.v1", KVConnectorRole=Role)
    fake_module(f"{root}.factory", KVConnectorFactory=fresh)
    return fresh


def nixl_bindings(fake_module: FakeModule, config_type: type) -> types.SimpleNamespace:
    made: list[Any] = []

    def make_agent(name: str, config: Any) -> str:
        made.append(config)
        return name

    bindings = types.SimpleNamespace(nixlAgent=make_agent, nixlAgentConfig=config_type, made=made)
    fake_module("nixl._api", nixlBind=bindings)
    return bindings


def test_agents_of_workers_pause_between_polls(fake_module: FakeModule, factory: type[Factory]) -> None:
    class Config:
        pthrDelay = 0

    bindings = nixl_bindings(fake_module, Config)
    factory.make = staticmethod(lambda *_: bindings.nixlAgent("agent", Config()))
    nixl_progress.install()
    factory.create_connector(None, Role.SCHEDULER, None)
    assert bindings.made.pop().pthrDelay == 0
    for _ in range(2):
        assert factory.create_connector(None, Role.WORKER, None) == "agent"
        assert bindings.made.pop().pthrDelay == nixl_progress.PROGRESS_PAUSE_US


def test_a_nixl_without_the_delay_is_left_alone(
    fake_module: FakeModule, factory: type[Factory], caplog: pytest.LogCaptureFixture
) -> None:
    class Config:
        __slots__ = ()

    bindings = nixl_bindings(fake_module, Config)
    factory.make = staticmethod(lambda *_: bindings.nixlAgent("agent", Config()))
    nixl_progress.install()
    assert factory.create_connector(None, Role.WORKER, None) == "agent"
    assert "no pthrDelay" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_a_connector_cannot_pin_its_thread(factory: type[Factory], fails: bool) -> None:
    cores = os.sched_getaffinity(0)

    def pin(*_: object) -> str:
        os.sched_setaffinity(0, {max(cores)})
        if fails:
            raise RuntimeError("no backend")
        return "connector"

    factory.make = staticmethod(pin)
    nixl_affinity.install()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="no backend"):
                factory.create_connector(None, Role.WORKER, None)
        else:
            assert factory.create_connector(None, Role.WORKER, None) == "connector"
        assert os.sched_getaffinity(0) == cores
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(
    ("idle_s", "timeout_ms", "polled_ms"),
    # Shortly after a message: at most the bound. Later: what vLLM itself would wait.
    [(0.0, None, 2), (0.0, 1, 1), (0.0, 5000, 2), (5e3, None, None), (5e3, 5000, 5000)],
)
def test_readers_sleep_instead_of_spinning(
    fake_module: FakeModule, idle_s: float, timeout_ms: int | None, polled_ms: int | None
) -> None:
    class SpinCondition:
        def __init__(self) -> None:
            self.last_read = time.monotonic() - idle_s
            self.busy_loop_s = 1e3  # vLLM's is a second; here no pause of this process may be longer
            self.polls: list[int | None] = []
            self.spins = 0

        def wait(self, timeout_ms: int | None = None) -> None:
            if time.monotonic() <= self.last_read + self.busy_loop_s:
                self.spins += 1
            else:
                self.polls.append(timeout_ms)

    fake_module("vllm.distributed.device_communicators.shm_broadcast", SpinCondition=SpinCondition)
    idle_wait.install()
    condition = SpinCondition()
    condition.wait(timeout_ms)
    assert (condition.spins, condition.polls) == (0, [polled_ms])
    assert condition.busy_loop_s == 1e3


def test_the_stage_buffer_is_made_when_it_is_first_needed(fake_module: FakeModule) -> None:
    class Model:
        calls = 0

        def make_empty_intermediate_tensors(self, **shape: Any) -> dict[str, Any]:
            self.calls += 1
            return shape

    class CPUModelRunner:
        max_num_tokens, device = 64, "cpu"
        model_config = types.SimpleNamespace(dtype="float32")

        def __init__(self) -> None:
            self.intermediate_tensors: Any = None
            self.model = Model()

        def sync_and_gather_intermediate_tensors(
            self, num_tokens: int, intermediate_tensors: Any, sync_self: bool
        ) -> Any:
            assert self.intermediate_tensors is not None
            return num_tokens, intermediate_tensors, sync_self

    fake_module("vllm.v1.worker.cpu_model_runner", CPUModelRunner=CPUModelRunner)
    pipeline_buffers.install()
    runner = CPUModelRunner()
    for _ in range(2):
        assert runner.sync_and_gather_intermediate_tensors(3, "t", True) == (3, "t", True)
    assert runner.intermediate_tensors == {"batch_size": 64, "dtype": "float32", "device": "cpu"}
    assert runner.model.calls == 1


def test_forked_children_die_with_their_parent(tmp_path: Path) -> None:
    """Parent, child and grandchild, forked after the tuning: killing the first ends the others."""
    pids = tmp_path / "pids"
    program = textwrap.dedent(
        f"""
        import os, time
        from hexgen2.vllm_plugin import parent_death
        parent_death.install()
        for _ in range(2):
            if os.fork():
                break
        with open({str(pids)!r}, "a") as file:
            file.write(f"{{os.getpid()}} ")
        time.sleep(600)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program]) as first:
        deadline = time.monotonic() + HUNG_S
        while not pids.exists() or len(pids.read_text().split()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = [int(pid) for pid in pids.read_text().split()]
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        while left := [pid for pid in family if _runs(pid)]:
            assert time.monotonic() < deadline + HUNG_S, left
            time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
