"""Pairs of real engines with the connector, and the two legs between them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from hexgen2.vllm_plugin.kv_connector import CONNECTOR_MODULE, CONNECTOR_NAME
from tests.engine.asymmetric_engines import (
    ANSWER_S,
    PLAIN,
    SERVER,
    VOCABULARY,
    Engine,
    engine,
    prompts,
    tiny_llama,
)
from tests.waiting import HUNG_S

BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * 8 * 2 * 4 * 32 * 4  # layers x (K, V) x KV heads x head size x float32
LEG_ONE = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass(frozen=True)
class Layout:
    """How to start an engine: its command and its arguments."""

    command: Sequence[str]
    arguments: tuple[str, ...] = ()


def layout(text: str) -> Layout:
    """`tp1`, `tp2`, `pp2`, or stages of unlike TP as `2x5+1x3`."""
    if text.startswith("tp"):
        return Layout(PLAIN, ("--tensor-parallel-size", text[2:]))
    if text.startswith("pp"):
        return Layout(PLAIN, ("--pipeline-parallel-size", text[2:]))
    return Layout(SERVER, ("--layout", text))


def connected(
    name: str,
    text: str,
    log: Path,
    *more: str,
    model: Path | None = None,
    policy: str = "fail",
    port: int | None = None,
    **settings: Any,
) -> AbstractContextManager[Engine]:
    """An engine with the connector, not ready yet; `settings` are the connector's."""
    chosen = layout(text)
    transfer = {
        "kv_connector": CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "engine_id": name,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"host": "127.0.0.1", **settings},
    }
    arguments = (*chosen.arguments, "--kv-transfer-config", json.dumps(transfer), *more)
    return engine(chosen.command, model or tiny_llama(), log, *arguments, port=port)


@contextmanager
def engines(
    folder: Path,
    names: dict[str, str],
    *more: str,
    policy: dict[str, str] | None = None,
    model: Path | None = None,
    **settings: Any,
) -> Iterator[dict[str, Engine]]:
    """Engines by name, all ready; `names` maps a name to a layout."""
    with ExitStack() as stack:
        running = {}
        for name, text in names.items():
            on_failure = (policy or {}).get(name, "fail")
            log = folder / f"{name}.log"
            started = connected(name, text, log, *more, model=model, policy=on_failure, **settings)
            running[name] = stack.enter_context(started)
        for one in running.values():
            one.wait_ready()
        yield running


def body(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "model": "model",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def prompt(seed: int, length: int) -> list[int]:
    """A prompt that shares no block with that of any other seed."""
    dice = random.Random(seed)
    return [dice.randrange(8, VOCABULARY) for _ in range(length)]


def alone(running: Engine, tokens: list[int], count: int) -> list[int]:
    """So many tokens of an engine that computes the prompt itself."""
    ids: list[int] = running.post(body(tokens, count))["choices"][0]["token_ids"]
    return ids


def leg_one(prefill: Engine, prompt: list[int]) -> dict[str, Any]:
    """`kv_transfer_params` of the answer."""
    answer = prefill.post({**body(prompt, 1), "kv_transfer_params": LEG_ONE})
    params: dict[str, Any] = answer["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    return params


def stream_of(params: dict[str, Any], key: str) -> dict[str, Any]:
    """What names a cache that is still to be computed, from what an earlier leg 1 answered."""
    return {**params["hexgen_stream"], "key": key}


def both_legs(
    prefill: Engine, decode: Engine, prompt: list[int], tokens: int, stream: dict[str, Any]
) -> list[int]:
    """Tokens of leg 2, with leg 1 under way at the same time."""
    first = {**body(prompt, 1), "kv_transfer_params": {**LEG_ONE, "hexgen_stream": {"key": stream["key"]}}}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(prefill.post, first)
        ids = token_ids(leg_two(decode, prompt, {"do_remote_prefill": True, "hexgen_stream": stream}, tokens))
        assert answer.result()["kv_transfer_params"]["do_remote_prefill"] is True
    return ids


def leg_two(decode: Engine, prompt: list[int], params: dict[str, Any], tokens: int) -> requests.Response:
    request = {**body(prompt, tokens), "kv_transfer_params": params}
    return requests.post(f"http://127.0.0.1:{decode.port}/v1/completions", json=request, timeout=ANSWER_S)


def token_ids(answer: requests.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def two_legs(prefill: Engine, decode: Engine, prompt: list[int], tokens: int) -> list[int]:
    return token_ids(leg_two(decode, prompt, leg_one(prefill, prompt), tokens))


def all_two_legs(
    prefill: Engine, decode: Engine, tokens: int, *, at_once: int | None = None
) -> list[list[int]]:
    """The standard prompts, all at once or `at_once` of them."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: two_legs(prefill, decode, prompt, tokens), prompts()))


def metric(running: Engine, name: str, **labels: str) -> float:
    """The sum of a metric over all its children with these labels."""
    text = requests.get(f"http://127.0.0.1:{running.port}/metrics", timeout=HUNG_S).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items())
    )


def received(running: Engine, peer: str) -> float:
    return metric(running, "vllm:hexgen_kv_transfer_bytes_sum", peer=peer)


def wait_idle(running: Engine, within_s: float = 2 * HUNG_S) -> None:
    """Wait until every block of the engine is free again."""
    deadline = time.monotonic() + within_s
    while used := metric(running, "vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline, f"{used:.3f} of the KV cache is still in use"
        time.sleep(0.1)
