"""`hexgen2 bench` against a running coordinator."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.coordinator.conftest import running

from hexgen2.cli.main import main
from hexgen2.coordinator import ApiKeys


async def test_the_address_that_clients_use_is_taken_too_and_a_key_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running({"p0>d0": 1.0}, keys=ApiKeys(["right"])) as stand:
        asked = ["bench", f"{stand.url}/v1", "--workload", "fixed:8/4", "--requests", "3", "--json"]
        assert await asyncio.to_thread(main, asked) == 2
        assert "wants an API key; give --api-key" in capsys.readouterr().err
        monkeypatch.setenv("HEXGEN2_API_KEY", "right")
        assert await asyncio.to_thread(main, asked) == 0
        assert json.loads(capsys.readouterr().out)["completed"] == 3
