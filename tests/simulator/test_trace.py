from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from hexgen2.cost import CostModel
from hexgen2.simulator import Requests, chrome_trace, simulate
from hexgen2.specs import Plan


def test_spans_of_every_request(make_plan: Callable[..., Plan], cost: CostModel) -> None:
    plan = make_plan(
        [
            ("p", "prefill", 0.5, 32, [(1, 8)]),
            ("d", "decode", 0.5, 32, [(1, 8)]),
            ("c", "colocated", 0.5, 32, [(1, 8)]),
        ],
        [("p", "d", 0.5)],
    )
    requests = Requests(np.array([0.0, 0.1, 0.2]), np.array([100, 200, 10**7]), np.array([5, 5, 5]))
    result = simulate(plan, cost, requests)
    document = json.loads(json.dumps(chrome_trace(result)))
    names = {e["pid"]: e["args"]["name"] for e in document["traceEvents"] if e["ph"] == "M"}
    spans: dict[tuple[int, str, str], list[float]] = {}
    for event in document["traceEvents"]:
        if event["ph"] != "M":
            spans.setdefault((event["id"], names[event["pid"]], event["name"]), []).append(event["ts"])
    split = 0 if result.timeline.paths[result.timeline.path[0]].prefill else 1
    assert set(spans) == {
        (split, "p", "queue + prefill"),
        (split, "p → d", "transfer"),
        (split, "d", "to first token"),
        (split, "d", "decode"),
        (1 - split, "c", "to first token"),
        (1 - split, "c", "decode"),
    }
    assert spans[split, "d", "decode"] == pytest.approx(
        [result.timeline.first[split] * 1e6, result.timeline.end[split] * 1e6]
    )
    for start, end in spans.values():
        assert start <= end
