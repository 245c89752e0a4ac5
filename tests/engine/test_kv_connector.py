"""The KV connector between two real engines: tokens, bytes, both directions, and everything that goes wrong."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from hexgen2.vllm_plugin.kv_connector.settings import Settings
from tests.engine.asymmetric_engines import Engine
from tests.vllm_plugin.kv_connector.engines import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    alone,
    body,
    engines,
    leg_one,
    leg_two,
    metric,
    prompt,
    received,
    token_ids,
    two_legs,
    wait_idle,
)
from tests.waiting import HUNG_S

pytestmark = pytest.mark.engine

TOKENS = 24
LEASE_S = 6.0
Pair = dict[str, Engine]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two engines of one layout, either of which may prefill for the other. After a failed transfer `strict`
    fails the request and `lenient` computes the prompt itself.
    """
    folder = tmp_path_factory.mktemp("engines")
    layouts = {"strict": "tp1", "lenient": "tp1"}
    with engines(folder, layouts, policy={"lenient": "recompute"}, lease_seconds=LEASE_S) as running:
        yield running


@pytest.mark.parametrize(("prefill", "decode"), [("strict", "lenient"), ("lenient", "strict")])
def test_both_directions_give_the_tokens_of_one_engine(pair: Pair, prefill: str, decode: str) -> None:
    sent = [prompt(100 + length + ord(prefill[0]), length) for length in (10, 37, 100, 203, 400)]
    before = received(pair[decode], prefill)
    with ThreadPoolExecutor(len(sent)) as pool:
        split = list(pool.map(lambda tokens: two_legs(pair[prefill], pair[decode], tokens, TOKENS), sent))
    assert split == [alone(pair[prefill], tokens, TOKENS) for tokens in sent]
    blocks = sum(-(-(len(tokens) - 1) // BLOCK_TOKENS) for tokens in sent)
    assert received(pair[decode], prefill) - before == blocks * BLOCK_BYTES
    for name in pair:
        wait_idle(pair[name])


def test_an_engine_may_do_both_legs(pair: Pair) -> None:
    tokens = prompt(1, 300)
    expected = alone(pair["lenient"], tokens, TOKENS)
    assert two_legs(pair["strict"], pair["strict"], tokens, TOKENS) == expected


def test_cached_blocks_are_not_sent_again(pair: Pair) -> None:
    tokens = prompt(2, 300)
    first = two_legs(pair["strict"], pair["lenient"], tokens, TOKENS)
    before = received(pair["lenient"], "strict")
    assert two_legs(pair["strict"], pair["lenient"], tokens, TOKENS) == first
    assert received(pair["lenient"], "strict") - before == BLOCK_BYTES  # the last, partial one; two are cached
    for name in pair:
        wait_idle(pair[name])


@pytest.mark.parametrize(("prefill", "decode"), [("strict", "lenient"), ("lenient", "strict")])
def test_an_expired_lease_never_gives_wrong_tokens(pair: Pair, prefill: str, decode: str) -> None:
    """The prefill's blocks are given away and overwritten before the decode engine asks for them."""
    tokens = prompt(3 + ord(prefill[0]), 400)
    params = leg_one(pair[prefill], tokens)
    expired = metric(pair[prefill], "vllm:hexgen_kv_expired_leases_total")
    time.sleep(LEASE_S + 1)
    with ThreadPoolExecutor(8) as pool:  # more than the whole cache of 32 blocks
        list(pool.map(lambda seed: alone(pair[prefill], prompt(seed, 900), TOKENS), range(1000, 1008)))
    answer = leg_two(pair[decode], tokens, params, TOKENS)
    if decode == "lenient":
        assert token_ids(answer) == alone(pair[prefill], tokens, TOKENS)
    else:
        assert answer.status_code == 500
    assert metric(pair[decode], "vllm:hexgen_kv_failed_transfers_total", peer=prefill) >= 1
    assert metric(pair[prefill], "vllm:hexgen_kv_expired_leases_total") == expired + 1
    for name in pair:
        wait_idle(pair[name])


def test_a_request_that_waits_keeps_its_lease(pair: Pair) -> None:
    """Long requests, eight of which fill the decode engine, keep it waiting for longer than the lease; more of
    them where the machine is quick.
    """
    for attempt in range(5):
        if waited_s(pair, seed=4 + 10_000 * attempt, fillers=8 * 2**attempt) > LEASE_S:
            return
    raise AssertionError("it never waited long enough")


def waited_s(pair: Pair, seed: int, fillers: int) -> float:
    """Seconds that a second leg took behind so many long requests; it must have got its cache in any case."""
    tokens = prompt(seed, 200)
    params = leg_one(pair["strict"], tokens)
    before = received(pair["lenient"], "strict")
    begun = time.monotonic()
    with ThreadPoolExecutor(fillers) as pool:
        filling = [
            pool.submit(pair["lenient"].post, body(prompt(seed + 1 + place, 10), 1000))
            for place in range(fillers)
        ]
        while not full(pair["lenient"], fillers) and not any(request.done() for request in filling):
            assert time.monotonic() - begun < HUNG_S, "the engine is not full"
            time.sleep(0.05)
        late = leg_two(pair["lenient"], tokens, params, TOKENS)
        took_s = time.monotonic() - begun
        for request in filling:
            request.result()
    assert token_ids(late) == alone(pair["strict"], tokens, TOKENS)
    assert received(pair["lenient"], "strict") - before == 2 * BLOCK_BYTES
    return took_s


def full(running: Engine, fillers: int) -> bool:
    """Whether the engine has so many requests, the most that it runs at once among them."""
    active, waiting = (metric(running, f"vllm:num_requests_{state}") for state in ("running", "waiting"))
    return active == 8 and active + waiting == fillers


@pytest.mark.parametrize(
    ("seed", "change"),
    [
        (50, {"hexgen": None}),
        (51, {"remote_block_ids": [[10**6] * 3]}),
        (52, {"remote_block_ids": "all"}),
        (53, {"hexgen": {"version": 99}}),
    ],
)
def test_params_that_make_no_sense_never_give_wrong_tokens(pair: Pair, seed: int, change: dict) -> None:
    tokens = prompt(seed, 300)
    expected = alone(pair["strict"], tokens, TOKENS)
    params = leg_one(pair["strict"], tokens)
    assert token_ids(leg_two(pair["lenient"], tokens, {**params, **change}, TOKENS)) == expected
    wait_idle(pair["strict"])
    wait_idle(pair["lenient"])


def test_aborts_leave_no_block_behind(pair: Pair) -> None:
    """Clients that go away at any moment of either leg; afterwards every block is free and tokens are right."""
    dice = random.Random(7)

    def one(seed: int) -> None:
        tokens = prompt(3000 + seed, dice.randrange(10, 400))
        try:
            request = {**body(tokens, 1), "kv_transfer_params": {"do_remote_decode": True}}
            url = "http://127.0.0.1:{}/v1/completions"
            first = requests.post(
                url.format(pair["strict"].port), json=request, timeout=dice.choice([0.01, 0.05, 20])
            ).json()
            request = {**body(tokens, 200), "kv_transfer_params": first["kv_transfer_params"]}
            requests.post(
                url.format(pair["lenient"].port), json=request, timeout=dice.choice([0.01, 0.03, 0.1, 0.3])
            )
        except requests.RequestException:
            pass

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(40)))
    for name in pair:
        wait_idle(pair[name])
    tokens = prompt(8, 250)
    assert two_legs(pair["strict"], pair["lenient"], tokens, TOKENS) == alone(pair["strict"], tokens, TOKENS)


def test_a_killed_prefill_engine_is_noticed_at_once(pair: Pair) -> None:
    """Last of this file: one engine of the pair is no more afterwards."""
    tokens = prompt(9, 300)
    expected = alone(pair["strict"], tokens, TOKENS)
    params = leg_one(pair["strict"], tokens)
    for member in pair["strict"].members():
        member.send_signal(signal.SIGKILL)
    pair["strict"].wait_gone(HUNG_S)
    begun = time.monotonic()
    assert token_ids(leg_two(pair["lenient"], tokens, params, TOKENS)) == expected
    assert time.monotonic() - begun < Settings().transfer_timeout_seconds, "it was waited for"
    wait_idle(pair["lenient"])
