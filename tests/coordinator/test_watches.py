"""Watches survive a mistake in one of their rounds."""

from __future__ import annotations

from typing import Any

import pytest

from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.health import HealthWatch
from hexgen2.coordinator.live import Live
from tests.waiting import until

from .conftest import running


@pytest.mark.parametrize(
    ("watch", "round_"), [(HealthWatch, "poll"), (EngineClient, "_look"), (Live, "sample")]
)
async def test_a_mistake_does_not_end_a_watch(
    watch: type, round_: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done, right, begun = [0], getattr(watch, round_), False

    def mistaken(self: Any, *rest: Any) -> Any:
        if begun:
            done[0] += 1
            if done[0] == 1:
                raise RuntimeError("a mistake")
        return right(self, *rest)

    monkeypatch.setattr(watch, round_, mistaken)
    async with running({"c0": 1.0}) as stand:
        begun = True
        await until(lambda: done[0] >= 3)
        await stand.complete()
    assert "a mistake in a round of the" in caplog.text
