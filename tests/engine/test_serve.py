"""`hexgen2 plan` and `hexgen2 serve` as a user runs them: real engines, the `openai` client, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest

from tests.waiting import HUNG_S

pytestmark = pytest.mark.engine

CLUSTER = """
name: two
nodes:
  - {name: a, gpu: cpu-1c, count: 1, host: 127.0.0.1}
  - {name: b, gpu: cpu-1c, count: 1, host: 127.0.0.1}
network: {default: {gbps: 20, latency_ms: 0.01}}
"""
START_S = 400


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    log: Path
    engines: list[psutil.Process]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=2 * HUNG_S)

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=HUNG_S) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def hexgen2(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "hexgen2.cli.main", *map(str, arguments)]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "cluster.yaml").write_text(CLUSTER)
    planned = (
        "--solver",
        "paper",
        "--model",
        "tiny-llama",
        "--workload",
        "fixed:64/64",
        "-o",
        folder / "plan.json",
    )
    subprocess.run(
        hexgen2("plan", "--cluster", folder / "cluster.yaml", *planned), check=True, capture_output=True
    )
    roles = [group["role"] for group in json.loads((folder / "plan.json").read_text())["groups"]]
    assert sorted(roles) == ["decode", "prefill"]
    return folder / "plan.json"


@pytest.fixture(scope="module")
def service(plan_file: Path) -> Iterator[Service]:
    log = plan_file.parent / "serve.log"
    with log.open("w") as stderr:
        arguments = (
            "--port",
            "0",
            "--json",
            "--run-directory",
            plan_file.parent / "run",
            "--max-restarts",
            "1",
        )
        process = subprocess.Popen(
            hexgen2("serve", plan_file, *arguments), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        url = read_url(process, log)
        engines = psutil.Process(process.pid).children(recursive=True)
        yield Service(process, url, log, engines)
    finally:
        process.kill()  # the guards end the engines of a dead parent
        process.wait()


def read_url(process: subprocess.Popen[str], log: Path) -> str:
    """The URL from the JSON document that `serve --json` prints once it serves."""
    assert process.stdout is not None
    document = ""
    for line in process.stdout:
        document += line
        if line.startswith("}"):
            return str(json.loads(document)["url"])
    raise AssertionError(f"serve ended: {log.read_text()}")


def test_chat_plain_and_streamed_give_one_answer(service: Service) -> None:
    client = service.client()
    messages = [{"role": "user", "content": "What is a KV cache?"}]
    fields = {"model": "tiny-llama", "messages": messages, "max_tokens": 24, "temperature": 0, "n": 1}
    plain = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert plain.choices[0].message.content
    assert streamed == plain.choices[0].message.content


def test_a_stop_string_and_logprobs(service: Service) -> None:
    client = service.client()
    fields = {"model": "tiny-llama", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**fields, logprobs=2)
    text = whole.choices[0].text
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens == 24
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    cut = client.completions.create(**fields, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == text[: text.index(stop)]


def test_an_unknown_model_gets_openais_404(service: Service) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        service.client().completions.create(model="gpt-9", prompt="a", max_tokens=1)
    assert caught.value.status_code == 404
    assert caught.value.code == "model_not_found"
    assert "gpt-9" in caught.value.message


def test_models_health_and_the_kv_cache_that_moved(service: Service) -> None:
    assert [model.id for model in service.client().models.list()] == ["tiny-llama"]
    service.client().completions.create(model="tiny-llama", prompt="The little fox " * 20, max_tokens=2)
    status, body = service.get("/health")
    assert status == 200
    assert json.loads(body)["paths_up"] == 1
    moved = {}
    for line in service.get("/metrics")[1].decode().splitlines():
        if line.startswith("hexgen2:kv_transfer_bytes_total{"):
            moved[line.split('"')[1]] = float(line.rsplit(" ", 1)[1])
    assert moved["d0"] > 0


def test_a_port_in_use_is_told_before_any_engine_starts(service: Service, plan_file: Path) -> None:
    port = service.url.rsplit(":", 1)[1]
    done = subprocess.run(
        hexgen2("serve", plan_file, "--port", port), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr


def test_bench_measures_the_service(service: Service) -> None:
    load = ("--workload", "fixed:40/8", "--requests", "6", "--concurrency", "2", "--json")
    done = subprocess.run(hexgen2("bench", service.url, *load), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["completed"] == document["requests"] == 6
    assert document["failed"] == 0
    assert document["output_tokens_per_s"] == pytest.approx(6 * 8 / document["duration_s"])
    assert 0 < document["ttft_s"]["p50"] <= document["e2e_s"]["p50"]
    assert document["kv_transfer"]["bytes"] > 0


def test_a_killed_engine_is_started_again_and_the_requests_wait_for_it(service: Service) -> None:
    """The only decode engine dies in the middle of a stream, its successor has another KV identity."""
    client = service.client().with_options(timeout=START_S)
    fields = {"model": "tiny-llama", "prompt": "Once upon a time", "max_tokens": 200, "temperature": 0}
    fields |= {"extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**fields).choices[0].text
    chunks = client.completions.create(**fields, stream=True)
    text = next(iter(chunks)).choices[0].text
    kill(service, "d0")
    wait_for(lambda: service.get("/health")[0] == 503)
    wait_for(lambda: service.get("/health")[0] == 200, within_s=START_S)
    assert client.completions.create(**fields).choices[0].text == whole
    assert 'hexgen2:engine_restarts_total{group="d0",role="decode"} 1.0' in service.get("/metrics")[1].decode()
    # The stream waited for an engine only as long as a client would: it went on, or ended with an error.
    with contextlib.suppress(openai.APIError):
        text += "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert text == whole
    assert whole.startswith(text)


def test_an_engine_that_does_not_last_ends_the_service_with_a_clear_error(service: Service) -> None:
    """The last test of this module: the only decode engine dies once more, and was to be restarted once."""
    engines = psutil.Process(service.process.pid).children(recursive=True)
    kill(service, "d0")
    assert service.process.wait(timeout=START_S) == 1
    text = service.log.read_text()
    assert "engine d0 was killed by signal 9" in text
    assert "d0 stays down: it was started again 1 time and did not last" in text
    assert "Traceback" not in text
    _, alive = psutil.wait_procs(engines, timeout=HUNG_S)
    assert alive == []


def kill(service: Service, group: str) -> None:
    """SIGKILL for a group's engine (not its guard)."""
    engines = psutil.Process(service.process.pid).children(recursive=True)
    next(process for process in engines if is_server(process, service, group)).send_signal(signal.SIGKILL)


def wait_for(condition: Callable[[], bool], within_s: float = HUNG_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_ctrl_c_while_engines_start_leaves_nothing_behind(plan_file: Path) -> None:
    process = subprocess.Popen(
        hexgen2("serve", plan_file, "--port", "0", "--run-directory", plan_file.parent / "second"),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + START_S
    family: list[psutil.Process] = []
    while len(family) < 4 and time.monotonic() < deadline:  # two guards and two engines
        time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=START_S)
    assert process.returncode == 1
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert psutil.wait_procs(family, timeout=HUNG_S)[1] == []


def is_server(process: psutil.Process, service: Service, group: str) -> bool:
    """Whether a process is the engine (not its guard) of a group, by the port that the deployment gave it."""
    deployment = json.loads((service.log.parent / "run" / "deployment.json").read_text())
    spec = next(spec for spec in deployment["processes"] if spec["group_id"] == group)
    # Its arguments but for the KV identity, which changes with each start.
    before = spec["argv"].index("--kv-transfer-config")
    return process.cmdline()[:before] == spec["argv"][:before]
