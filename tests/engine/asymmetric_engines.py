"""vLLM engines for the tests of layouts: started as a user would start them, and always ended."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from hexgen2.deploy import free_ports
from hexgen2.deploy.ports import two_ports

START_S = 400.0
ANSWER_S = 120.0
STOP_S = 30.0
TOKENS = 48
VOCABULARY = 2048
LENGTHS = (10, 37, 100, 203, 400)
CHUNKED = ("--enable-chunked-prefill", "--max-num-batched-tokens", "96")
WHOLE = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "1024")

PLAIN = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
SERVER = (sys.executable, "-m", "hexgen2.vllm_plugin.asymmetric.server")
COMMON = (
    *("--served-model-name", "model", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(32 << 20), "--max-model-len", "1024", "--max-num-seqs", "8"),
)
ENVIRONMENT = {
    "HEXGEN2_VLLM_TUNING": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


def tiny_llama() -> Path:
    """The shipped model: 8 layers, 8 heads, 4 KV heads."""
    return Path(str(resources.files("hexgen2"))) / "assets" / "tiny-llama"


def free_port() -> int:
    """A port that is free now, of those that the kernel gives to nobody by itself: an engine takes its time
    until it listens, and other processes open ports meanwhile.
    """
    return free_ports()("127.0.0.1")


def master_port() -> str:
    """The same for the nodes of a group, which take the next one too."""
    return str(two_ports(free_ports(), "127.0.0.1")[0])


@dataclass
class Engine:
    """One process group: a server, or a follower node's process, with all its children."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def members(self) -> list[psutil.Process]:
        """The processes of the engine that are alive, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = os.getsid(process.pid) == self.process.pid
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, ProcessLookupError):
                continue
        return found

    def named(self, part: str) -> psutil.Process:
        """The member whose title has `part` in it, as vLLM names its processes."""
        return next(process for process in self.members() if part in " ".join(process.cmdline()))

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the engine ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=30).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError(f"the engine is not ready after {START_S} s:\n{self.tail()}")

    def wait_gone(self, within_s: float) -> float:
        """Seconds until every process of the engine was gone; fails where that takes longer than `within_s`."""
        begun = time.monotonic()
        while members := self.members():
            if time.monotonic() - begun > within_s:
                left = [" ".join(process.cmdline())[:60] for process in members]
                raise AssertionError(f"after {within_s} s there is still {left}:\n{self.tail()}")
            self.process.poll()
            time.sleep(0.1)
        return time.monotonic() - begun

    def stop(self) -> None:
        """End the engine in order, and what is left of it by force."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        for process in self.members():
            process.send_signal(signal.SIGKILL)
        self.process.wait(STOP_S)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=ANSWER_S)
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document


@contextmanager
def engine(
    command: Sequence[str], model: Path, log: Path, *more: str, port: int | None = None, **environment: str
) -> Iterator[Engine]:
    """An engine in its own session; whatever is left of it is killed at the end."""
    port = port or free_port()
    arguments = [*command, "--model", str(model), "--port", str(port), *COMMON, *more]
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **environment},
        )
    running = Engine(process, port, log)
    try:
        yield running
    finally:
        running.stop()


def prompts() -> list[list[int]]:
    """Prompts of 10 to 400 token ids, always the same ones, without the special ids."""
    dice = random.Random(5)
    return [[dice.randrange(8, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def greedy(running: Engine, *, at_once: int = len(LENGTHS)) -> list[list[int]]:
    """What the engine continues all prompts with, `at_once` of them sent together."""

    def continue_(prompt: list[int]) -> list[int]:
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        ids: list[int] = running.post(body)["choices"][0]["token_ids"]
        return ids

    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(continue_, prompts()))
    assert all(len(answer) == TOKENS for answer in answers)
    return answers


@cache
def one_ranks_tokens() -> list[list[int]]:
    """The tokens of vLLM's own engine of one rank for the shipped model; started once a session."""
    with TemporaryDirectory() as folder, engine(PLAIN, tiny_llama(), Path(folder) / "log", *WHOLE) as alone:
        alone.wait_ready()
        return greedy(alone)
