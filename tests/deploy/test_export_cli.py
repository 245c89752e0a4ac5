"""`hexgen2 export` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hexgen2.cli.main import main

from .exports import PLANS


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    plan = PLANS["pair without hosts"].model_copy(update={"model": "llama-2-7b"})
    layers = tuple(
        group.model_copy(
            update={"stages": tuple(stage.model_copy(update={"layers": 32}) for stage in group.stages)}
        )
        for group in plan.groups
    )
    path.write_text(json.dumps(plan.model_copy(update={"groups": layers}).document()))
    return path


@pytest.mark.parametrize("target", ["kubernetes", "compose", "shell"])
def test_files_are_written_and_listed(
    plan_file: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / target
    assert main(["export", str(plan_file), "--to", target, "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["to"] == target
    assert sorted(document["files"]) == sorted(entry.name for entry in out.iterdir())
    assert document["notes"]
    # Again into the same folder, with keys: they are for their owner alone.
    keys = tmp_path / "keys"
    keys.write_text("k1\n")
    again = ["export", str(plan_file), "--to", target, "-o", str(out), "--api-key-file", str(keys)]
    assert main(again) == 0
    secrets = [entry for entry in out.iterdir() if entry.name.startswith("api-keys")]
    assert [entry.stat().st_mode & 0o777 for entry in secrets] == [0o600]


def test_options_reach_the_files(plan_file: Path, tmp_path: Path) -> None:
    options = ["--name", "chat", "--image", "reg/x:2", "--port", "9000", "--weights", "/data/llama"]
    assert main(["export", str(plan_file), "--to", "kubernetes", "-o", str(tmp_path / "k"), *options]) == 0
    _, deployment = yaml.safe_load_all((tmp_path / "k" / "d0.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert deployment["metadata"]["name"] == "chat-d0"
    assert container["image"] == "reg/x:2"
    assert container["args"][container["args"].index("--model") + 1] == "/data/llama"
    *_, coordinator = yaml.safe_load_all((tmp_path / "k" / "coordinator.yaml").read_text())
    (front,) = coordinator["spec"]["template"]["spec"]["containers"]
    assert front["ports"][0]["containerPort"] == 9000


def test_what_else_lies_in_the_folder_is_told(plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "k"
    out.mkdir()
    (out / "p9.yaml").write_text("old\n")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("rich.console.Console.print", lambda _self, text: printed.append(text))
        assert main(["export", str(plan_file), "--to", "kubernetes", "-o", str(out)]) == 0
    assert any("also holds p9.yaml" in line for line in printed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "compose", "--address", "zz=10.0.0.1"], "--address: zz: is not a node"),
        (["--to", "kubernetes", "--api-key-file", "/no/such/keys"], "/no/such/keys: cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    plan_file: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(plan_file), "-o", str(tmp_path / "out"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_told(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", str(plan_file), "--to", "shell", "-o", str(tmp_path / "file" / "x")]) == 2
    assert "give another path" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--address", "a"], ["--port", "0"], ["--to", "nomad"]])
def test_wrong_arguments(plan_file: Path, tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(plan_file), "--to", "shell", "-o", str(tmp_path), *wrong])
    assert caught.value.code == 2
