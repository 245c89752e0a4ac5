"""300 requests over the KV connector: clients go away, the prefill engine is killed and started again."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.engine.asymmetric_engines import Engine
from tests.vllm_plugin.kv_connector.engines import (
    body,
    connected,
    leg_two,
    received,
    token_ids,
    wait_idle,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

REQUESTS = 300
KILLED_AT = 120
TOKENS = 24
LEASE_S = 5.0


def prompt(seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(8, 2048) for _ in range(dice.randrange(10, 400))]


def url(running: Engine) -> str:
    return f"http://127.0.0.1:{running.port}/v1/completions"


def one(seed: int, prefill: Engine, decode: Engine, stream: dict[str, Any] | None) -> str:
    """What came of a request: `right`, `aborted` (by us), `failed` (with an error), or `wrong`. With a `stream`
    (what a leg 1 of this start of the prefill engine has said of it) both legs go at once.
    """
    dice = random.Random(-seed)
    patience = dice.choice([0.01, 0.05, 0.2]) if dice.random() < 0.3 else 60.0
    tokens = prompt(seed)
    leg: dict[str, Any] = {"do_remote_decode": True}
    if stream is not None:
        stream = {**stream, "key": f"soak{seed}"}
        leg["hexgen_stream"] = stream

    def first_leg() -> requests.Response:
        return requests.post(
            url(prefill), json={**body(tokens, 1), "kv_transfer_params": leg}, timeout=patience
        )

    try:
        if stream is None:
            first = first_leg()
            if first.status_code != 200:
                return "failed"
            params = first.json()["kv_transfer_params"]
        else:
            threading.Thread(target=suppressed, args=(first_leg,)).start()
            params = {"do_remote_prefill": True, "hexgen_stream": stream}
        if patience < 60:
            request = {**body(tokens, 200), "kv_transfer_params": params}
            requests.post(url(decode), json=request, timeout=patience)
            return "right"  # quicker than the client's patience
        second = leg_two(decode, tokens, params, TOKENS)
    except requests.Timeout:
        return "aborted"
    except requests.ConnectionError:
        return "failed"
    if second.status_code != 200:
        return "failed"
    # The decode engine by itself, without a cache from elsewhere: the prompt computed anew gives the same.
    again = requests.post(url(decode), json={**body(tokens, TOKENS), "cache_salt": str(seed)}, timeout=60)
    return "right" if token_ids(second) == token_ids(again) else "wrong"


def suppressed(leg: Callable[[], requests.Response]) -> None:
    with suppress(requests.RequestException):
        leg()


def known_stream(prefill: Engine) -> dict[str, Any]:
    """What a leg 1 says of how later caches of this start of the engine can be followed."""
    request = {**body(prompt(-2), 1), "kv_transfer_params": {"do_remote_decode": True}}
    answer = requests.post(url(prefill), json=request, timeout=60).json()
    stream: dict[str, Any] = answer["kv_transfer_params"]["hexgen_stream"]
    return stream


@pytest.mark.parametrize("legs", ["in turn", "at once"])
def test_soak(legs: str, tmp_path: Path) -> None:
    settings = {"lease_seconds": LEASE_S, "transfer_timeout_seconds": 10.0, "begin_timeout_seconds": 5.0}
    with ExitStack() as stack:
        first = stack.enter_context(connected("p", "tp1", tmp_path / "p0.log", **settings))
        decode = stack.enter_context(connected("d", "tp1", tmp_path / "d.log", **settings))
        for running in (first, decode):
            running.wait_ready()
        engines = [first]
        streams = [known_stream(first) if legs == "at once" else None]
        done = threading.Semaphore(0)
        restarted = threading.Event()

        def run(seed: int) -> str:
            if seed >= REQUESTS * 2 // 3:
                restarted.wait(240)
            try:
                return one(seed, engines[-1], decode, streams[-1])
            finally:
                done.release()

        def restart() -> None:
            for _ in range(KILLED_AT):
                done.acquire()
            for member in first.members():
                member.send_signal(signal.SIGKILL)
            first.wait_gone(10)
            time.sleep(1)
            again = stack.enter_context(connected("p", "tp1", tmp_path / "p1.log", port=first.port, **settings))
            again.wait_ready()
            streams.append(known_stream(again) if legs == "at once" else None)
            engines.append(again)
            restarted.set()

        with ThreadPoolExecutor(9) as pool:
            killer = pool.submit(restart)
            outcomes = Counter(pool.map(run, range(REQUESTS)))
            killer.result()
        assert outcomes["wrong"] == 0
        assert outcomes.total() == REQUESTS
        # Those before the kill and all after the restart that nobody aborted.
        assert outcomes["right"] >= REQUESTS // 3
        assert outcomes["failed"] >= 1, "nothing was under way when the engine was killed"
        assert received(decode, "p") > 0
        for running in (engines[-1], decode):
            wait_idle(running, LEASE_S + 30)
        tokens = prompt(-1)
        params = requests.post(
            url(engines[-1]),
            json={**body(tokens, 1), "kv_transfer_params": {"do_remote_decode": True}},
            timeout=60,
        ).json()["kv_transfer_params"]
        assert leg_two(decode, tokens, params, TOKENS).status_code == 200
