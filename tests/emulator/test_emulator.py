"""The emulated engine speaks vLLM's protocol: what the coordinator's tests stand on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.waiting import until

from hexgen2.emulator import EmulatedEngine, EmulatorConfig, Fault, LinearTiming, tokens
from hexgen2.emulator.engine import Sequence
from hexgen2.emulator.protocol import TextOut

PROMPT = "The quick brown fox"
DO_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def complete(http: aiohttp.ClientSession, engine: EmulatedEngine, **body: Any) -> dict[str, Any]:
    async with http.post(engine.url + "/v1/completions", json={"prompt": PROMPT, **body}) as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def events(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[Any]:
    """Every event's JSON; "[DONE]" as it is."""
    async with http.post(url, json={**body, "stream": True}) as response:
        assert response.status == 200
        text = await response.text()
    found = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in found]


@given(st.lists(st.integers(0, tokens.VOCABULARY - 1), min_size=1))
def test_tokens_survive_their_text(ids: list[int]) -> None:
    assert tokens.encode(tokens.decode(ids)) == ids


@given(st.lists(st.integers(0, 999), min_size=1), st.integers(1, 30), st.integers(0, 30))
def test_a_continuation_gives_the_same_tokens(prompt: list[int], total: int, cut: int) -> None:
    whole = tokens.generate(prompt, total)
    cut = min(cut, total)
    assert whole[:cut] + tokens.generate([*prompt, *whole[:cut]], total - cut) == whole


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=30), st.lists(st.text("t123 ", min_size=1), max_size=3)
)
def test_stop_strings_never_show(ids: list[int], stops: list[str]) -> None:
    out, text, reason = TextOut(tuple(stops), keep_stop=False), "", None
    for index, token in enumerate(ids):
        more, reason = out.add(token, last=index == len(ids) - 1)
        text += more
        if reason is not None:
            break
    assert not any(stop in text for stop in stops)
    assert tokens.decode(ids).startswith(text)
    assert reason in (None, *stops)
    assert (reason is None) == (text == tokens.decode(ids))


async def test_answer_and_stream_agree(http: aiohttp.ClientSession) -> None:
    async with EmulatedEngine().running() as engine:
        answer = await complete(http, engine, max_tokens=9, return_token_ids=True)
        choice = answer["choices"][0]
        assert choice["token_ids"] == tokens.generate(tokens.encode(PROMPT), 9)
        assert choice["finish_reason"] == "length"
        assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}
        body = {"prompt": PROMPT, "max_tokens": 9, "stream_options": {"include_usage": True}}
        *chunks, used, done = await events(http, engine.url + "/v1/completions", body)
        assert done == "[DONE]"
        assert used["usage"] == answer["usage"]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


async def test_chat_stream_begins_with_the_role(http: aiohttp.ClientSession) -> None:
    async with EmulatedEngine().running() as engine:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 3}
        first, *rest, done = await events(http, engine.url + "/v1/chat/completions", body)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert len(rest) == 3
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"


async def test_n_and_several_prompts_have_an_index_each(http: aiohttp.ClientSession) -> None:
    async with EmulatedEngine().running() as engine:
        answer = await complete(http, engine, prompt=["a", "b c"], n=2, max_tokens=2)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert len({choice["text"] for choice in answer["choices"]}) == 4
        assert answer["usage"]["prompt_tokens"] == 3


async def test_kv_cache_moves_once_and_is_counted(http: aiohttp.ClientSession) -> None:
    config = EmulatorConfig(kv_bytes_per_token=100)
    async with EmulatedEngine(config).running() as prefill, EmulatedEngine(config).running() as decode:
        leg1 = await complete(http, prefill, max_tokens=1, kv_transfer_params=DO_PREFILL)
        kv = leg1["kv_transfer_params"]
        assert prefill.kv_store.held == 1
        right = await complete(http, decode, max_tokens=5, kv_transfer_params=kv, return_token_ids=True)
        assert right["choices"][0]["token_ids"] == tokens.generate(tokens.encode(PROMPT), 5)
        assert (decode.kv_bytes, prefill.kv_store.held) == (400, 0)
        # The second pull finds other data, as on a real engine: HTTP 200 and wrong tokens.
        wrong = await complete(http, decode, max_tokens=5, kv_transfer_params=kv, return_token_ids=True)
        assert wrong["choices"][0]["token_ids"] != right["choices"][0]["token_ids"]


async def test_a_lease_that_ran_out_gives_wrong_tokens(http: aiohttp.ClientSession) -> None:
    config = EmulatorConfig(lease_s=0.01)
    async with EmulatedEngine(config).running() as prefill, EmulatedEngine().running() as decode:
        kv = (await complete(http, prefill, max_tokens=1, kv_transfer_params=DO_PREFILL))["kv_transfer_params"]
        await asyncio.sleep(0.03)
        late = await complete(http, decode, max_tokens=5, kv_transfer_params=kv, return_token_ids=True)
        assert late["choices"][0]["token_ids"] != tokens.generate(tokens.encode(PROMPT), 5)
        assert prefill.kv_store.expired_total == 1


async def test_a_dead_producer_is_an_error_500(http: aiohttp.ClientSession) -> None:
    async with EmulatedEngine().running() as decode, EmulatedEngine().running() as prefill:
        kv = (await complete(http, prefill, max_tokens=1, kv_transfer_params=DO_PREFILL))["kv_transfer_params"]
        prefill.kill()
        body = {"prompt": PROMPT, "kv_transfer_params": kv}
        async with http.post(decode.url + "/v1/completions", json=body) as response:
            assert response.status == 500
        with pytest.raises(aiohttp.ClientError):
            await complete(http, prefill)


async def test_a_producer_started_again_is_an_error_500(http: aiohttp.ClientSession) -> None:
    """It listens where the lost one did and knows nothing of its prompts; vLLM compares engine ids."""
    async with EmulatedEngine().running() as decode:
        async with EmulatedEngine().running() as prefill:
            kv = (await complete(http, prefill, max_tokens=1, kv_transfer_params=DO_PREFILL))[
                "kv_transfer_params"
            ]
        async with EmulatedEngine().running(prefill.port):
            body = {"prompt": PROMPT, "kv_transfer_params": kv}
            async with http.post(decode.url + "/v1/completions", json=body) as response:
                assert response.status == 500


async def test_a_client_that_leaves_frees_the_slot(http: aiohttp.ClientSession) -> None:
    timing = LinearTiming(step_base_s=0.01)
    async with EmulatedEngine(EmulatorConfig(timing=timing)).running() as engine:
        for stream in (True, False):
            task = asyncio.create_task(complete(http, engine, max_tokens=10_000, stream=stream))
            await until(lambda: bool(engine.core.running))
            task.cancel()
            await until(lambda: not engine.core.running)
        assert engine.core.aborted_total == 2


async def test_batching_is_continuous() -> None:
    """With two slots four requests run in two waves, and a step costs the same for one as for two."""
    timing = LinearTiming(prefill_base_s=0.0, step_base_s=0.01)
    engine = EmulatedEngine(EmulatorConfig(timing=timing, max_batch=2))
    for _ in range(4):  # all are there before it begins
        engine.core.submit(Sequence(tokens.encode(PROMPT), 10))
    async with engine.running():
        await until(lambda: not engine.core.waiting and not engine.core.running)
    assert engine.core.busy_s == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"stream_options": {"include_usage": True}}, 400, "Stream options"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1, "min_tokens": 4}, 400, "min_tokens"),
        ({"prompt": ""}, 400, "prompt"),
        ({"max_tokens": 10**9}, 400, "maximum context"),
    ],
)
async def test_bad_requests(http: aiohttp.ClientSession, body: dict[str, Any], status: int, word: str) -> None:
    async with (
        EmulatedEngine().running() as engine,
        http.post(engine.url + "/v1/completions", json={"prompt": "a", **body}) as response,
    ):
        assert response.status == status
        assert word in (await response.json())["error"]["message"]


async def test_text_offsets_count_tokens_not_what_was_shown(http: aiohttp.ClientSession) -> None:
    """As vLLM's do: text that is held back for a stop string does not shift them."""
    async with EmulatedEngine().running() as engine:
        offsets = []
        for stop in ([], ["never to be found"]):
            body = {"prompt": "a", "max_tokens": 6, "logprobs": 1, "stop": stop}
            *chunks, _ = await events(http, engine.url + "/v1/completions", body)
            offsets.append([at for chunk in chunks for at in chunk["choices"][0]["logprobs"]["text_offset"]])
        assert offsets[0] == offsets[1]


async def test_error_event_is_followed_by_done(http: aiohttp.ClientSession) -> None:
    async with EmulatedEngine(fault=Fault("error_event", after_tokens=2)).running() as engine:
        *chunks, error, done = await events(http, engine.url + "/v1/completions", {"prompt": "a"})
        assert (len(chunks), done) == (2, "[DONE]")
        assert error["error"]["code"] == 500


@pytest.mark.parametrize("kind", ["die", "cut"])
async def test_a_broken_connection(http: aiohttp.ClientSession, kind: Any) -> None:
    async with EmulatedEngine(fault=Fault(kind, after_tokens=2)).running() as engine:
        with pytest.raises(aiohttp.ClientError):
            await events(http, engine.url + "/v1/completions", {"prompt": "a"})


async def test_a_hang_is_silent_until_thawed(http: aiohttp.ClientSession) -> None:
    async with EmulatedEngine(fault=Fault("hang", after_tokens=2, times=1)).running() as engine:
        task = asyncio.create_task(
            events(http, engine.url + "/v1/completions", {"prompt": "a", "max_tokens": 4})
        )
        await until(lambda: engine.core.frozen)
        with pytest.raises(TimeoutError):
            await http.get(engine.url + "/health", timeout=aiohttp.ClientTimeout(total=0.3))
        assert not task.done()
        engine.thaw()
        assert len(await task) == 5


async def test_finish_reason_error_comes_with_status_200(http: aiohttp.ClientSession) -> None:
    async with EmulatedEngine(fault=Fault("finish_error", times=1)).running() as engine:
        assert (await complete(http, engine))["choices"][0]["finish_reason"] == "error"
        assert (await complete(http, engine))["choices"][0]["finish_reason"] == "length"
