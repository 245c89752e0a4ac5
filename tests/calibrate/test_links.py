"""Bandwidth and latency of a link from real reads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hexgen2.calibrate.links import fit_link, measure, serving
from hexgen2.cli.main import main
from hexgen2.specs.errors import InputError


@pytest.mark.parametrize(("bandwidth", "latency"), [(1.25e9, 100e-6), (50e9, 5e-6)])
def test_the_fit_finds_the_link(bandwidth: float, latency: float) -> None:
    rng = np.random.default_rng(0)
    sizes = [1 << power for power in range(12, 27, 2)]
    times = {
        size: (2 * latency + size / bandwidth) * float(np.exp(0.02 * rng.standard_normal())) for size in sizes
    }
    times[sizes[3]] *= 5  # something else ran on the machine
    found = fit_link(times)
    assert found.bandwidth == pytest.approx(bandwidth, rel=0.05)
    assert found.latency == pytest.approx(latency, rel=0.1)
    assert found.document()["gbps"] == pytest.approx(bandwidth * 8e-9, rel=0.05)


def test_one_size_is_not_enough() -> None:
    with pytest.raises(ValueError, match="does not tell"):
        fit_link({4096: 1e-3})


def test_reads_over_tcp_come_one_after_another() -> None:
    with serving("127.0.0.1") as port:
        for _ in range(2):  # one reader after another
            times = measure("127.0.0.1", port, "tcp", sizes=(4096, 1 << 20))
            assert set(times) == {4096, 1 << 20}
            assert all(seconds > 0 for seconds in times.values())


def test_the_command_prints_an_entry_of_a_cluster_file(capsys: pytest.CaptureFixture[str]) -> None:
    with serving("127.0.0.1") as port:
        assert main(["calibrate", "--link", f"127.0.0.1:{port}", "--transport", "tcp", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gbps"] > 0
    assert document["latency_ms"] > 0
    assert len(document["measured"]) == 8


def test_nobody_there_is_a_users_mistake() -> None:
    with pytest.raises(InputError, match="--serve-links"):
        measure("127.0.0.1", 9, "tcp")


@pytest.mark.parametrize("arguments", [["--link", "nowhere"], []])
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
