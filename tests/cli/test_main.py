"""The frame of the command line: exit codes and one-line mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hexgen2.cli.main import main

PLAN = Path(__file__).parents[1] / "simulator" / "plan_20_gpus.json"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "the following arguments are required: --cluster, --model, --workload"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (
            ["estimate", "--gpu", "L4", "--model", "opt-13b", "--prompt", "0", "--batch", "1"],
            "0 is not at least 1",
        ),
        (
            ["estimate", "--gpu", "L4", "--model", "opt-13b", "--prompt", "9", "--batch", "9" * 12],
            "--batch: 999999999999 is more than 1,000,000",
        ),
        (
            ["plan", "--cluster", "c", "--model", "m", "--workload", "w", "--slo-ttft", "-1"],
            "-1 is not above zero",
        ),
        (["plan", "--cluster", "no.yaml", "--model", "opt-13b", "--workload", "hphd"], "no.yaml: no such file"),
        (["explain", "no.json"], "no.json: no such file"),
        (
            ["estimate", "--gpu", "H1", "--model", "opt-13b", "--prompt", "9", "--batch", "1"],
            "unknown GPU type 'H1'; use one of",
        ),
        (
            ["estimate", "--gpu", "L4", "--model", "opt-13b", "--tp", "3", "--prompt", "9", "--batch", "1"],
            "--tp: the heads of opt-13b do not divide over 3 GPUs; use one of 1, 2, 4, 5, 8",
        ),
        (["simulate", "no.json", "--workload", "hphd", "--seed", "-3"], "--seed: -3 is not at least 0"),
        (["calibrate", "http://127.0.0.1:1", "-o", "p.yaml"], "calibrate: --model: is missing; give it"),
        (["calibrate", "--serve-links", "0", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0 ("),
        (["serve", "no.json", "--slowdown", "2"], "--slowdown: is for emulated engines; add --engine emulated"),
        (["serve", "no.json", "--profile", "x"], "--profile: is for emulated engines; add --engine emulated"),
        (["explain", f"{__file__}/plan.json"], "plan.json: cannot be read (Not a directory); give the path"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as leaving:  # argparse leaves by itself
        code = leaving.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_plan_file_cut_off_in_the_middle_is_a_mistake_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"version": 1, "cluster": {"name": "x", "no')
    assert main(["explain", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"{path}: line 1: is not whole JSON" in captured.err


@pytest.mark.parametrize(
    "command",
    [
        ["simulate", "PLAN", "--workload", "hphd"],
        ["explain", "PLAN", "--shadow"],
        ["serve", "PLAN", "--engine", "emulated", "--port", "0"],
        ["serve", "PLAN", "--port", "0"],
        ["export", "PLAN", "--to", "shell", "-o", "out"],
    ],
    ids=" ".join,
)
def test_a_plan_of_another_model_is_a_mistake_in_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, path = json.loads(PLAN.read_text()), tmp_path / "plan.json"
    stages = plan["groups"][0]["stages"]
    stages[-1]["layers"] -= 1
    path.write_text(json.dumps(plan))
    assert main([str(path) if part == "PLAN" else part for part in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    held = sum(stage["layers"] for stage in stages)
    assert (
        f"group {plan['groups'][0]['id']}: its stages hold {held} layers and llama-2-70b has 80; use the"
        in line
    )


def test_help_of_every_command_works_without_loading_a_solver_or_a_server() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from hexgen2.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "heavy = {'scipy', 'ortools', 'matplotlib', 'aiohttp', 'vllm', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "plan" in done.stdout
