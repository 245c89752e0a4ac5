"""The shell export run for real: the example of three CPU nodes, the shipped model, one answer, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from hexgen2.deploy import check_engine
from hexgen2.specs import InputError
from tests.waiting import HUNG_S

from .exports import run_of_free_ports

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
START_S = 400


@pytest.fixture(autouse=True)
def _needs_vllm() -> None:
    try:
        check_engine("cpu", transfers=True)
    except InputError as error:
        pytest.skip(str(error))


def hexgen2(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hexgen2.cli.main", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def test_the_shell_export_serves(tmp_path: Path) -> None:
    cluster, plan, folder = ROOT / "examples/clusters/local-cpu.yaml", tmp_path / "plan.json", tmp_path / "out"
    hexgen2(
        "plan",
        "--cluster",
        cluster,
        "--model",
        "tiny-llama",
        "--workload",
        "fixed:64/64",
        "--solver",
        "paper",
        "-o",
        plan,
    )
    keys = tmp_path / "keys"
    keys.write_text("k-1\n")
    port, first = run_of_free_ports(8)
    told = hexgen2(
        *("export", plan, "--to", "shell", "-o", folder, "--port", port, "--first-port", first),
        *("--api-key-file", keys, "--json"),
    )
    assert "start.sh" in json.loads(told.stdout)["files"]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen([folder / "start.sh"], stderr=stderr, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while "serving tiny-llama at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        assert complete(port, "k-2") is None, "a wrong key is refused"
        answer = complete(port, "k-1")
        assert answer is not None
        assert answer["choices"][0]["text"]
        assert answer["usage"]["completion_tokens"] == 8
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HUNG_S) as response:
            moved = [
                float(line.rsplit(" ", 1)[1])
                for line in response.read().decode().splitlines()
                if line.startswith("hexgen2:kv_transfer_bytes_total{")
            ]
        assert sum(moved) > 0, "prefill and decode are two engines"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 8  # guards of three engines and the coordinator, and those
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the script's process group
        assert process.wait(timeout=3 * HUNG_S) == 130
        assert psutil.wait_procs(family, timeout=HUNG_S)[1] == []
    finally:
        process.kill()  # the guards notice
        process.wait()


def complete(port: int, key: str) -> dict[str, Any] | None:
    """A completion of eight tokens; None where the key is refused."""
    body = {"model": "tiny-llama", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return None
        raise
