"""The Grafana dashboard asks for metrics that exist."""

from __future__ import annotations

import json
import re
from importlib.resources import files

from hexgen2.emulator import Fault

from .conftest import Stand

NAME = re.compile(r"hexgen2:[a-z_0-9]+")


async def test_every_metric_of_the_dashboard_is_served(pair: Stand) -> None:
    text = files("hexgen2.coordinator").joinpath("grafana/dashboard.json").read_text(encoding="utf-8")
    dashboard = json.loads(text)
    asked = {name for p in dashboard["panels"] for t in p["targets"] for name in NAME.findall(t["expr"])}
    # Labelled metrics show once something has been counted: one good stream, one that is tried again.
    await pair.stream(max_tokens=3)
    pair.engines["d0"].fault = Fault("http_500", times=1)
    await pair.complete(n=2, max_tokens=2)
    pair.engines["d0"].fault = Fault("error_event", after_tokens=1, times=1)
    await pair.stream(max_tokens=3, presence_penalty=1)
    async with pair.http.get(pair.url + "/metrics") as response:
        served = set(NAME.findall(await response.text()))
    assert asked <= served, asked - served
    # And the other way round: what is served for operators is shown.
    families = {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in served}
    assert families <= {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in asked}
