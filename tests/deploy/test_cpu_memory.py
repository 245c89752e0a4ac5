"""The KV cache that a CPU engine is told to take."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.deploy.cpu_memory import SPARE_BLOCKS, cpu_cache
from hexgen2.deploy.numerics import Numerics
from hexgen2.deploy.options import EngineOptions
from hexgen2.specs import GIB, InputError, parse_cluster

from .builders import MODEL, group

FLOAT32 = Numerics("cpu", "float32", "auto", "CPU_ATTN", 32)
TOKEN_BYTES = 8 * 2 * 4 * 32 * 4  # layers x (K, V) x KV heads x head size x float32


def devices(memory_gib: float) -> object:
    kind = {
        "name": "core",
        "vendor": "cpu",
        "generation": "x86",
        "memory_gib": memory_gib,
        "dense_tflops": 0.1,
        "dense_dtype": "fp32",
        "memory_bandwidth_gb_s": 10,
        "link": {"kind": "loopback", "gb_s": 1, "latency_us": 10},
    }
    nodes = [{"name": "a", "gpu": "core", "count": 4}]
    return parse_cluster({"nodes": nodes, "gpu_types": [kind]}, "test")


def test_a_full_batch_bounds_it() -> None:
    options = EngineOptions(max_model_len=256, cpu_kv_cache_limit=int(4 * GIB))
    cache = cpu_cache(
        group("g", "decode", (["a/0"], 8), max_batch=4), devices(2), MODEL, FLOAT32, options, "plan"
    )
    blocks = 2 * 4 * 256 // 32 + SPARE_BLOCKS
    assert (cache.max_model_len, cache.kv_bytes) == (256, blocks * 32 * TOKEN_BYTES)


def test_the_limit_bounds_it_and_the_longest_request() -> None:
    options = EngineOptions(cpu_kv_cache_limit=1000 * TOKEN_BYTES)
    cache = cpu_cache(group("g", "decode", (["a/0"], 8)), devices(2), MODEL, FLOAT32, options, "plan")
    assert cache.max_model_len == (1000 // 32 - SPARE_BLOCKS) * 32
    assert cache.kv_bytes <= 1000 * TOKEN_BYTES


def test_the_tightest_stage_decides() -> None:
    options = EngineOptions(cpu_kv_cache_limit=2**22)
    narrow = cpu_cache(
        group("g", "colocated", (["a/0"], 1), (["a/1"], 7)), devices(2), MODEL, FLOAT32, options, "p"
    )
    even = cpu_cache(
        group("g", "colocated", (["a/0"], 4), (["a/1"], 4)), devices(2), MODEL, FLOAT32, options, "p"
    )
    split = cpu_cache(group("g", "colocated", (["a/0", "a/1"], 8)), devices(2), MODEL, FLOAT32, options, "p")
    # Halving layers or heads per rank doubles the tokens that fit.
    assert narrow.max_model_len < even.max_model_len == split.max_model_len


def test_no_room_is_told() -> None:
    with pytest.raises(InputError, match=r"group g: .*no room for a KV cache"):
        cpu_cache(group("g", "decode", (["a/0"], 8)), devices(0.01), MODEL, FLOAT32, EngineOptions(), "plan")


@settings(max_examples=60, deadline=None)
@given(
    memory_gib=st.floats(0.05, 8),
    limit=st.integers(2**20, 2**33),
    batch=st.integers(1, 512),
    first=st.integers(1, 7),
    tp=st.sampled_from([1, 2]),
)
def test_never_more_than_the_device_or_the_limit(
    memory_gib: float, limit: int, batch: int, first: int, tp: int
) -> None:
    a_group = group(
        "g",
        "colocated",
        ([f"a/{i}" for i in range(tp)], first),
        (["a/2", "a/3"][:tp], 8 - first),
        max_batch=batch,
    )
    options = EngineOptions(cpu_kv_cache_limit=limit)
    try:
        cache = cpu_cache(a_group, devices(memory_gib), MODEL, FLOAT32, options, "plan")
    except InputError:
        return
    assert cache.kv_bytes <= min(memory_gib * GIB, limit)
    per_token = TOKEN_BYTES / 8 * max(first, 8 - first) / tp
    # What vLLM makes of it holds at least one longest request.
    assert cache.kv_bytes // (32 * per_token) * 32 >= cache.max_model_len + 32
    assert 0 < cache.max_model_len <= MODEL.max_positions
