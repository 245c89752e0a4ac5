"""The two legs of a disaggregated request: which body each engine gets. Pure functions.

Leg 1 computes the prompt on the prefill engine and generates one token that is thrown away; its answer carries
`kv_transfer_params`. Leg 2 is the client's own body with that object, opaque and whole; the decode engine
loads the KV cache and generates every token of the answer itself.

A KV cache belongs to exactly one prompt of one sequence: vLLM's producer frees it after the first pull, and
a second pull reads whatever is there by then, with HTTP 200 and wrong tokens. `handoff_obstacle` names the
requests for which that would happen, or whose prompt must be computed where the answer is made; they go to
one engine that does both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

# The rest of a lease is for the second leg's way to its engine and into a slot there.
_LEASE_USABLE = 0.8

# In `kv_transfer_params`: a KV cache that can be read while it is computed (docs/kv-connector.md).
STREAM = "hexgen_stream"

# These belong to the coordinator. From a client they would let it make an engine read from an address of
# its choice.
RESERVED_FIELDS = ("kv_transfer_params", "ec_transfer_params")


@dataclass(frozen=True)
class Handoff:
    """What leg 1 left for leg 2: the KV cache that `prefill`, in its `life`, holds under a lease since `since`
    (event-loop time, at the earliest). `kv` is None where it holds none."""

    kv: Body | None
    prefill: str
    life: int
    since: float

    def expired(self, now: float, lease_s: float) -> bool:
        """Whether the cache must not be fetched any more. A producer may have given its blocks to another
        prompt, and vLLM's NIXL connectors would then read that one's: HTTP 200 and wrong tokens."""
        return now - self.since > _LEASE_USABLE * lease_s


def strip_reserved(body: Body) -> tuple[Body, bool]:
    """The body without fields that only the coordinator may set, and whether there were any."""
    if not any(body.get(field) is not None for field in RESERVED_FIELDS):
        return body, False
    return {key: value for key, value in body.items() if key not in RESERVED_FIELDS}, True


def prefill_body(body: Mapping[str, Any], key: str | None = None) -> Body:
    """Leg 1: the same prompt, one token, one plain answer whose KV cache is kept for the other engine. With a
    `key` that engine may read it by that name while it is computed."""
    leg = {key: value for key, value in body.items() if key not in ("stream_options", "min_tokens")}
    leg["max_tokens"] = 1
    if leg.get("max_completion_tokens") is not None:
        leg["max_completion_tokens"] = 1  # it takes precedence over max_tokens
    leg["stream"] = False
    leg["kv_transfer_params"] = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    if key is not None:
        leg["kv_transfer_params"][STREAM] = {"key": key}
    return leg


def stream_of(kv_transfer_params: Any) -> Body | None:
    """What an answer of leg 1 says of how later caches of its engine can be read while they are computed (by
    HexgenConnector); None where they cannot."""
    stream = kv_transfer_params.get(STREAM) if isinstance(kv_transfer_params, Mapping) else None
    return dict(stream) if isinstance(stream, Mapping) else None


def overlapped_body(body: Mapping[str, Any], stream: Mapping[str, Any], key: str) -> Body:
    """Leg 2 that is sent before leg 1 has ended."""
    params = {"do_remote_prefill": True, "do_remote_decode": False, STREAM: {**stream, "key": key}}
    return decode_body(body, params)


def decode_body(body: Mapping[str, Any], kv_transfer_params: Any) -> Body:
    """Leg 2: the client's body with what leg 1 answered."""
    return {**body, "kv_transfer_params": kv_transfer_params}


def handoff_obstacle(body: Mapping[str, Any]) -> str | None:
    """Why a request must be served by one engine; None where the two legs give the same answer.

    >>> handoff_obstacle({"prompt": "a"}) is None, handoff_obstacle({"prompt": ["a", "b"]})
    (True, 'several_prompts')
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(item, int) for item in prompt):
        return "several_prompts"
    if body.get("prompt_embeds") is not None:
        return "prompt_embeds"  # vLLM's connector counts token ids only
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        return "several_sequences"
    if body.get("use_beam_search"):
        return "beam_search"
    if body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    # logprobs: 0 asks for the sampled token's, so 0 and False (chat's "none") must be told apart.
    logprobs = body.get("logprobs")
    if body.get("echo") and ((logprobs is not None and logprobs is not False) or body.get("max_tokens") == 0):
        return "prompt_logprobs"
    if body.get("truncate_prompt_tokens") is not None:
        # -1 cuts to what max_tokens leaves free: leg 1 would cut elsewhere than leg 2.
        return "truncate_prompt_tokens"
    return None
