"""Clusters and plans survive being written and read: value → document → YAML or JSON → value."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_documents import CLUSTER, group, plan_document, stage

from hexgen2.specs import Cluster, parse_cluster, parse_plan
from hexgen2.specs.catalog import gpu_type_names

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=("C", "Z")), min_size=1)
RATES = st.floats(0.1, 10_000)
LINKS = st.fixed_dictionaries({"gbps": RATES}, optional={"latency_ms": st.floats(0, 100)})
TYPE_NAMES = ("mine", "other")


@st.composite
def gpu_types(draw: st.DrawFn, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "vendor": draw(st.sampled_from(["nvidia", "amd", "cpu"])),
        "generation": draw(NAMES),
        "memory_gib": draw(st.floats(0.5, 512)),
        "dense_tflops": draw(st.floats(0.01, 5_000)),
        "dense_dtype": draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        "memory_bandwidth_gb_s": draw(st.floats(1, 10_000)),
        "link": {
            "kind": draw(NAMES),
            "gb_s": draw(st.floats(0.1, 2_000)),
            "latency_us": draw(st.floats(0, 1_000)),
        },
    }


@st.composite
def cluster_documents(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    types = draw(st.lists(st.sampled_from(TYPE_NAMES), max_size=2, unique=True))
    known = st.sampled_from([*gpu_type_names(), *types])
    node = st.fixed_dictionaries(
        {"gpu": known, "count": st.integers(1, 4)},
        optional={
            "nic_gbps": RATES,
            "price_per_gpu_hour": st.floats(0, 50),
            "intra_link": LINKS,
            "host": NAMES,
        },
    )
    pairs = [(a, b) for place, a in enumerate(names) for b in names[:place]]
    linked = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    document: dict[str, Any] = {
        "name": draw(NAMES),
        "nodes": [{"name": name, **draw(node)} for name in names],
        "network": {
            "default": draw(LINKS),
            "links": [{"between": list(pair), **draw(LINKS)} for pair in linked],
        },
    }
    if types:
        document["gpu_types"] = [draw(gpu_types(name)) for name in types]
    return document


def assert_same(one: Cluster, other: Cluster) -> None:
    """Equal but for the rounding of a GPU type's units."""
    assert (one.name, one.nodes, one.network) == (other.name, other.nodes, other.network)
    assert [gpu.id for gpu in one.gpus] == [gpu.id for gpu in other.gpus]
    for ours, theirs in zip(one.inline_types, other.inline_types, strict=True):
        for field in ("name", "vendor", "generation", "dense_dtype", "link_kind"):
            assert getattr(ours, field) == getattr(theirs, field)
        for field in ("memory_bytes", "flops", "memory_bandwidth"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-12)
        assert ours.link.bandwidth == pytest.approx(theirs.link.bandwidth, rel=1e-12)
        assert ours.link.latency == pytest.approx(theirs.link.latency, rel=1e-12)
    assert one.price_per_hour == other.price_per_hour
    np.testing.assert_allclose(one.bandwidth, other.bandwidth, rtol=1e-12)
    np.testing.assert_allclose(one.latency, other.latency, rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(cluster_documents())
def test_a_cluster_survives_yaml_and_json(document: dict[str, Any]) -> None:
    cluster = parse_cluster(document, "given")
    written = cluster.document()
    assert_same(parse_cluster(yaml.safe_load(yaml.safe_dump(written)), "yaml"), cluster)
    assert_same(parse_cluster(json.loads(json.dumps(written)), "json"), cluster)


@st.composite
def plan_documents(draw: st.DrawFn) -> dict[str, Any]:
    """Any division of the requests over a pair of groups and a colocated one, any figures."""
    document = plan_document()
    split = draw(st.integers(1, 39))
    routed = draw(st.floats(0, 1))
    document["groups"] = [
        group("p0", "prefill", routed, [stage(["a/0", "a/1"], 0, 40)]),
        group("d0", "decode", routed, [stage(["b/0"], 0, split), stage(["b/1", "b/2"], split, 40 - split)]),
        group("c0", "colocated", 1 - routed, [stage(["b/3"], 0, 40)]),
    ]
    rate = draw(st.floats(0, 1e6))
    document["routes"] = [{"from": "p0", "to": "d0", "share": routed, "rps": rate, "capacity_rps": rate}]
    document["throughput_rps"] = rate
    document["objective"]["value"] = draw(st.floats(allow_nan=False, allow_infinity=False))
    document["upper_bound"] = draw(st.none() | st.floats(0, 1e9))
    document["seed"] = draw(st.integers())
    document["profiles"] = draw(st.lists(NAMES, max_size=2))
    document["notes"] = draw(st.lists(st.text(), max_size=2))
    document["slo"] = {
        "ttft_s": draw(st.none() | st.floats(0.01, 10)),
        "tpot_s": draw(st.none() | st.floats(0.01, 10)),
    }
    return document


@settings(deadline=None, max_examples=60)
@given(plan_documents())
def test_a_plan_survives_json(document: dict[str, Any]) -> None:
    plan = parse_plan(document, "given")
    written = plan.document()
    assert written == document
    assert parse_plan(json.loads(json.dumps(written)), "json") == plan


def test_a_catalog_type_is_not_written_out() -> None:
    """The file names the type: a later catalog's figures count."""
    assert parse_cluster(CLUSTER, "given").document() == CLUSTER
