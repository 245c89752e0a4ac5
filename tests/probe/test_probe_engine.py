"""From a bare CPU machine to an answer, with no file written by hand: probe, plan, serve."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from hexgen2.cli.main import main
from hexgen2.deploy import check_engine
from hexgen2.specs import InputError, load_cluster


def test_probe_then_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster, plan = tmp_path / "cluster.yaml", tmp_path / "plan.json"
    assert main(["probe", "--devices", "cpu", "--cpu-devices", "2", "-o", str(cluster), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert load_cluster(cluster).document()["nodes"] == document["nodes"]
    workload = ["--model", "tiny-llama", "--workload", "fixed:64/32", "--solver", "paper"]
    assert main(["plan", "--cluster", str(cluster), *workload, "-o", str(plan)]) == 0
    roles = [group["role"] for group in json.loads(plan.read_text())["groups"]]
    assert sorted(roles) == ["decode", "prefill"]


@pytest.mark.engine
def test_probe_plan_serve(tmp_path: Path) -> None:
    try:
        check_engine("cpu", transfers=True)
    except InputError as error:
        pytest.skip(str(error))

    def hexgen2(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "hexgen2.cli.main", *map(str, arguments)]

    cluster, plan, log = tmp_path / "cluster.yaml", tmp_path / "plan.json", tmp_path / "log"
    subprocess.run(hexgen2("probe", "--devices", "cpu", "-o", cluster), check=True, capture_output=True)
    assert len(load_cluster(cluster).nodes) >= 2
    workload = ("--model", "tiny-llama", "--workload", "fixed:64/32", "--solver", "paper")
    subprocess.run(
        hexgen2("plan", "--cluster", cluster, *workload, "-o", plan), check=True, capture_output=True
    )
    with log.open("w") as stderr:
        serving = subprocess.Popen(
            hexgen2("serve", plan, "--port", 0, "--json", "--run-directory", tmp_path / "run"),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        assert serving.stdout is not None
        text = ""
        for line in serving.stdout:
            text += line
            if line.startswith("}"):
                break
        assert text, log.read_text()
        body = json.dumps({"model": "tiny-llama", "prompt": "The little fox", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"{json.loads(text)['url']}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 4
        serving.send_signal(signal.SIGINT)
        assert serving.wait(timeout=240) == 0
    finally:
        serving.kill()  # the guards end the engines of a dead parent
        serving.wait()
