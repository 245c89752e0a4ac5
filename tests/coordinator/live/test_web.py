"""/live and /live/state on a running coordinator: figures, events, keys, nothing of any prompt."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hexgen2.coordinator import ApiKeys, Coordinator
from hexgen2.report.live import page_files
from tests.coordinator.conftest import MODEL, Stand, running
from tests.coordinator.test_update import config_of
from tests.waiting import until

STATE = "/live/state"


async def get(stand: Stand, path: str, **headers: str) -> tuple[int, str, Any]:
    async with stand.http.get(stand.url + path, headers=headers) as response:
        return response.status, await response.text(), response.headers


async def state(stand: Stand, query: str = "") -> dict[str, Any]:
    stand.coordinator.live.sample()
    status, text, headers = await get(stand, STATE + query)
    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    found: dict[str, Any] = json.loads(text)
    return found


async def test_the_state_tells_what_was_done() -> None:
    async with running({"p0>d0": 0.5, "p0>d1": 0.5}) as stand:
        before = await state(stand)
        assert before["status"] == "ok"
        assert before["routes"][0]["share"] is None, "nothing was sent yet"
        for _ in range(6):
            await stand.stream("the secret of the prompt", max_tokens=4)
        found = await state(stand, "?after=0&pictures=1")
        assert found["totals"]["answered"] == 6
        assert found["totals"]["output_tokens"] == 24
        assert found["now"]["ttft_p50_s"] > 0
        assert found["now"]["tpot_p99_s"] > 0
        shares = {(route["from"], route["to"]): route["share"] for route in found["routes"]}
        assert shares == {("p0", "d0"): 0.5, ("p0", "d1"): 0.5}
        groups = {group["id"]: group for group in found["groups"]}
        assert {name: group["share"] for name, group in groups.items()} == {"p0": 1.0, "d0": 0.5, "d1": 0.5}
        assert found["history"]["fine"]["seq"][-1] == found["seq"]
        assert "<svg" in found["pictures"]["flows"]
        assert found["pictures"]["network"] is None, "there is no plan"
        assert "secret" not in json.dumps(found)
        newer = await state(stand, f"?after={found['seq']}")
        # It looks once a second by itself, too.
        assert newer["history"]["fine"]["seq"] == [*range(found["seq"] + 1, newer["seq"] + 1)] != []


async def test_engines_that_go_and_come_and_other_routes_are_events() -> None:
    async with running({"p0>d0": 0.5, "p0>d1": 0.5}) as stand:
        stand.coordinator.live.sample()
        d1 = stand.coordinator.fleet.engines["d1"]
        port = stand.engines["d1"].port
        await stand.engines["d1"].stop()
        await until(lambda: not d1.up)
        down = await state(stand)
        assert [group["id"] for group in down["groups"] if not group["up"]] == ["d1"]
        await stand.engines["d1"].start(port)
        await until(lambda: d1.up)
        stand.coordinator.live.sample()
        stand.coordinator.live.tell("would flip: more could be served")
        await stand.coordinator.update(config_of(stand, {"p0>d0": 0.2, "p0>d1": 0.8}))
        found = await state(stand)
        assert [event["kind"] for event in found["events"]] == ["down", "up", "plan", "routes"]


async def test_the_kv_bytes_are_asked_for_only_while_somebody_looks() -> None:
    async with running({"p0>d0": 1.0}) as stand:
        live, session = stand.coordinator.live, stand.http
        await live._ask(session)
        assert not live._kv
        live.looked()
        await live._ask(session)
        await stand.complete("a b c d e f", max_tokens=4)
        live._asked_s = 0.0
        await live._ask(session)
        assert live.kv_bytes_per_s()["d0"] > 0
        live._looked_s = float("-inf")
        await live._ask(session)
        assert live.kv_bytes_per_s() == {}


@pytest.mark.parametrize("path", sorted(page_files(False)))
async def test_the_files_come_with_strict_rules(path: str, pair: Stand) -> None:
    status, text, headers = await get(pair, path)
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    outside = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert outside == set(), "nothing is loaded from elsewhere"


async def test_with_keys_on_the_figures_need_one() -> None:
    async with running({"p0>d0": 1.0}, keys=ApiKeys(["right"])) as stand:
        status, page, _ = await get(stand, "/live")
        assert status == 200
        assert 'name="hexgen2-keys" content="on"' in page
        assert (await get(stand, STATE))[0] == 401
        assert (await get(stand, STATE, Authorization="Bearer wrong"))[0] == 401
        assert (await get(stand, STATE + "?after=0", Authorization="Bearer right"))[0] == 200


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 40, "%00"])
async def test_nonsense_is_refused(after: str, pair: Stand) -> None:
    status, text, _ = await get(pair, f"{STATE}?after={after}")
    assert status == 400
    assert "after" in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
async def test_it_is_read_only(method: str, pair: Stand) -> None:
    for path in ("/live", STATE):
        async with pair.http.request(method, pair.url + path) as response:
            assert response.status == 405


async def test_with_several_workers_it_knows_of_all_requests(pair: Stand) -> None:
    async with Coordinator(pair.coordinator.config, ApiKeys(["right"]), workers=2).running() as door:
        pair.headers = {"Authorization": "Bearer right"}
        for _ in range(6):
            async with pair.http.post(
                door.url + "/v1/completions",
                json={"model": MODEL, "prompt": "a b", "max_tokens": 3},
                headers={**pair.headers, "Connection": "close"},
            ) as response:
                assert response.status == 200
        # A worker tells of an answer when it has been sent.
        await until(lambda: door.workers is not None and not any(one.serving for one in door.workers.links))
        door.live.sample()
        async with pair.http.get(door.url + STATE) as response:
            assert response.status == 401
        async with pair.http.get(door.url + STATE, headers=pair.headers) as response:
            assert (await response.json())["totals"]["answered"] == 6
