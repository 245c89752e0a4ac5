"""Both legs of a request at once, between real engines: the cache is read while it is computed."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import requests

from tests.engine.asymmetric_engines import CHUNKED, Engine
from tests.vllm_plugin.kv_connector.engines import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    LEG_ONE,
    alone,
    body,
    both_legs,
    engines,
    leg_one,
    leg_two,
    metric,
    prompt,
    received,
    stream_of,
    token_ids,
    wait_idle,
)

pytestmark = pytest.mark.engine

TOKENS = 16
LEASE_S = 6.0
BEGIN_S = 12.0
FAILED = "vllm:hexgen_kv_failed_transfers_total"


@pytest.fixture(
    scope="module",
    params=[
        "tp1 tp1",
        *(pytest.param(pair, marks=pytest.mark.slow) for pair in ("2x5+1x3 1x3+2x5", "tp1 pp2")),
    ],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Engine]]:
    prefill, decode = request.param.split()
    with engines(
        tmp_path_factory.mktemp("engines"),
        {"p": prefill, "d": decode},
        *CHUNKED,
        "--block-size",
        str(BLOCK_TOKENS),
        lease_seconds=LEASE_S,
        begin_timeout_seconds=BEGIN_S,
        overlap_read_bytes=1,  # as many reads as there can be: the model's caches are small
    ) as running:
        yield running


def streams(pair: dict[str, Engine]) -> dict[str, Any]:
    """What a first leg teaches of the prefill engine."""
    params = leg_one(pair["p"], prompt(0, 20))
    token_ids(leg_two(pair["d"], prompt(0, 20), params, 1))
    return params


def test_tokens_and_bytes_are_those_of_two_legs_in_turn(pair: dict[str, Engine]) -> None:
    """Prompts of one to ten chunks, one by one and all at once."""
    known = streams(pair)
    sent = [prompt(100 + length, length) for length in (10, 100, 400, 900)]
    before = received(pair["d"], "p")
    split = [
        both_legs(pair["p"], pair["d"], tokens, TOKENS, stream_of(known, f"a{len(tokens)}")) for tokens in sent
    ]
    more = [prompt(200 + length, length) for length in (33, 203, 500, 890)]
    with ThreadPoolExecutor(len(more)) as pool:
        split += pool.map(
            lambda tokens: both_legs(pair["p"], pair["d"], tokens, TOKENS, stream_of(known, f"b{len(tokens)}")),
            more,
        )
    assert split == [alone(pair["d"], tokens, TOKENS) for tokens in (*sent, *more)]
    blocks = sum(-(-(len(tokens) - 1) // BLOCK_TOKENS) for tokens in (*sent, *more))
    assert received(pair["d"], "p") - before == blocks * BLOCK_BYTES
    assert metric(pair["d"], FAILED, peer="p") == 0
    for name in pair:
        wait_idle(pair[name])


def test_a_leg_that_never_comes_fails_the_other(pair: dict[str, Engine]) -> None:
    """A prefill that its client gives up, and one of which nothing was ever heard."""
    stream = stream_of(streams(pair), "given-up")
    tokens = prompt(1, 900)
    failed = metric(pair["d"], FAILED, peer="p")

    def first() -> None:
        request = {
            **body(tokens, 1),
            "kv_transfer_params": {**LEG_ONE, "hexgen_stream": {"key": stream["key"]}},
        }
        with suppress(requests.Timeout):
            requests.post(f"http://127.0.0.1:{pair['p'].port}/v1/completions", json=request, timeout=0.05)

    leg = threading.Thread(target=first)
    leg.start()
    answer = leg_two(pair["d"], tokens, {"do_remote_prefill": True, "hexgen_stream": stream}, TOKENS)
    leg.join()
    # A machine that computes the prompt within the patience answers; any other fails, as it is told to.
    if answer.status_code == 200:
        assert token_ids(answer) == alone(pair["d"], tokens, TOKENS)
    else:
        assert answer.status_code == 500
        assert metric(pair["d"], FAILED, peer="p") > failed  # once a worker
    for name in pair:
        wait_idle(pair[name])


def test_aborts_and_full_caches_give_no_wrong_token_and_leave_no_block(pair: dict[str, Engine]) -> None:
    """More long prompts than the prefill engine's cache holds, so that some lose their blocks, and clients that
    go away at any moment of either leg.
    """
    known = streams(pair)
    dice = random.Random(7)

    def one(seed: int) -> str:
        tokens, key = prompt(3000 + seed, dice.randrange(10, 900)), f"soak{seed}"
        patience = dice.choice([60, 60, 60, 0.05, 0.2])
        late = dice.random() < 0.2  # leg 2 alone, or leg 1 alone, at first
        there = {**LEG_ONE, "hexgen_stream": {"key": key}}
        here = {"do_remote_prefill": True, "hexgen_stream": stream_of(known, key)}
        first = {**body(tokens, 1), "kv_transfer_params": there}
        second = {**body(tokens, TOKENS), "kv_transfer_params": here}

        def leg(running: Engine, request: dict[str, Any], patience: float) -> requests.Response | None:
            try:
                url = f"http://127.0.0.1:{running.port}/v1/completions"
                return requests.post(url, json=request, timeout=patience)
            except requests.Timeout:
                return None

        with ThreadPoolExecutor(2) as pool:
            begun = pool.submit(leg, pair["p"], first, patience)
            if late:
                begun.result()
            answer = leg(pair["d"], second, patience if dice.random() < 0.5 else 60)
        if answer is None:
            return "aborted"
        if answer.status_code != 200:
            return "failed"
        return "right" if token_ids(answer) == alone(pair["d"], tokens, TOKENS) else "wrong"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(one, range(40)))
    assert "wrong" not in outcomes
    assert "right" in outcomes
    for name in pair:
        wait_idle(pair[name])
