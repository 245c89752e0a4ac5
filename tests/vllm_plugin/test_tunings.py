"""Which tunings are applied, when, and what is said about the others."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from hexgen2 import deploy, vllm_plugin
from hexgen2.vllm_plugin import compat, tunings
from hexgen2.vllm_plugin.compat import Reliance, base_version

from .conftest import FakeModule

NAMES = [tuning.name for tuning in tunings.TUNINGS]


@dataclass
class Bench:
    """Tunings that only note that they were installed."""

    installed: list[str]

    def lines(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [record.getMessage() for record in caplog.records]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, fake_module: FakeModule) -> Bench:
    bench = Bench([])
    noting = tuple(
        replace(tuning, relies_on=(), install=lambda name=tuning.name: bench.installed.append(name))
        for tuning in tunings.TUNINGS
    )
    monkeypatch.setattr(tunings, "TUNINGS", noting)
    fake_module("vllm", __version__="0.32.0+cpu")
    return bench


@pytest.mark.parametrize(
    ("wanted", "chosen", "unknown"),
    [
        ("cpu", NAMES, ()),
        ("cpu,fork", NAMES, ()),
        ("parent-death,ucx-settings", ["parent-death", "ucx-settings"], ()),
        (" idle-wait , fork ", ["fork", "idle-wait"], ()),
        ("gpu", [], ("gpu",)),
        (",", [], ()),
    ],
)
def test_select(wanted: str, chosen: list[str], unknown: tuple[str, ...]) -> None:
    found, words = tunings.select(wanted)
    assert ([tuning.name for tuning in found], words) == (chosen, unknown)


def test_register_does_nothing_unless_asked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "  "):
        monkeypatch.delenv(vllm_plugin.TUNING_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(vllm_plugin.TUNING_VARIABLE, value)
        vllm_plugin.register()
    assert bench.installed == []
    monkeypatch.setenv(vllm_plugin.TUNING_VARIABLE, "cpu")
    vllm_plugin.register()
    assert bench.installed == NAMES


def test_the_module_alone_imports_nothing_heavy() -> None:
    """vLLM loads the plugin in each of its processes: unasked it must cost nothing."""
    program = (
        "import sys, hexgen2.vllm_plugin as p; p.register();"
        "print([m for m in sys.modules if m.split('.')[0] in ('vllm', 'torch', 'pydantic', 'numpy')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={})
    assert run.stdout == "[]\n"


def test_each_tuning_is_installed_once_a_process(bench: Bench) -> None:
    tunings.apply("fork")
    tunings.apply("cpu")
    tunings.apply("cpu")
    assert sorted(bench.installed) == sorted(NAMES)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.32.1", "dev"])
def test_another_vllm_is_left_alone(
    bench: Bench, fake_module: FakeModule, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    fake_module("vllm", __version__=version)
    with caplog.at_level(logging.WARNING):
        tunings.apply("cpu")
    assert bench.installed == []
    assert len(bench.lines(caplog)) == 1
    assert version in bench.lines(caplog)[0]


def test_a_tuning_that_does_not_fit_is_left_out_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, *rest = tunings.TUNINGS
    broken = replace(first, relies_on=(Reliance("vllm.nowhere", "Thing"),))
    monkeypatch.setattr(tunings, "TUNINGS", (broken, *rest))
    with caplog.at_level(logging.WARNING):
        tunings.apply("cpu")
    assert bench.installed == NAMES[1:]
    left_out, applied = bench.lines(caplog)
    assert f"tuning {first.name} is left out, since vllm.nowhere cannot be imported" in left_out
    assert applied.endswith(", ".join(NAMES[1:]))


def test_an_unknown_name_is_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tunings.apply("forc,fork")
    assert "no tuning 'forc'" in bench.lines(caplog)[0]
    assert bench.installed == ["fork"]


@pytest.mark.parametrize(
    ("attribute", "parameters", "problem"),
    [
        ("Thing.method", ("self", "a"), None),
        ("Thing", None, None),
        ("Thing.method", ("self", "b"), "takes (self, a), not (self, b)"),
        ("Thing.other", ("self",), "has no Thing.other"),
        ("Thing.value", ("self",), "is not callable"),
    ],
)
def test_reliances(
    fake_module: FakeModule, attribute: str, parameters: tuple[str, ...] | None, problem: str | None
) -> None:
    class Thing:
        value = 3

        def method(self, a: int) -> int:
            return a

    fake_module("vllm.somewhere", Thing=Thing)
    found = Reliance("vllm.somewhere", attribute, parameters).problem()
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_versions() -> None:
    assert base_version("0.32.0+cpu") == base_version("0.32.0") == "0.32.0"
    # deploy lets in what the plugin knows.
    from hexgen2.deploy.environment import FITTING

    assert all(version.startswith(f"{FITTING}.") for version in compat.KNOWN_VERSIONS)


def test_deploy_asks_by_names_that_exist() -> None:
    """deploy may not import the plugin, so it spells the variable and its values itself."""
    from tests.deploy.builders import cluster, compiled, group, plan

    for kind in ("cpu-1c", "L4"):
        a_plan = plan(cluster(("a", kind, 1)), [group("c0", "colocated", (["a/0"], 8))])
        value = compiled(a_plan).processes[0].env[vllm_plugin.TUNING_VARIABLE]
        chosen, unknown = tunings.select(value)
        assert chosen
        assert not unknown
    assert deploy.__doc__
