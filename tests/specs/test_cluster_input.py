"""A mistake in a cluster file gets one line that names the file, the field, the value and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hexgen2.specs import InputError, load_cluster, parse_cluster

NODES = "nodes: [{name: a, gpu: L40, count: 2}, {name: b, gpu: T4, count: 1}]"
NETWORK = "network: {default: {gbps: 10}}"
TYPE = (
    "{name: X, vendor: nvidia, generation: new, memory_gib: 10, dense_tflops: 5,"
    " memory_bandwidth_gb_s: 100, link: {kind: pcie4, gb_s: 32, latency_us: 5}}"
)


def node(fields: str) -> str:
    return f"nodes: [{{name: a, gpu: L40, count: 2, {fields}}}]"


def network(fields: str) -> str:
    return f"{NODES}\nnetwork: {{{fields}}}"


BAD = [
    # document, field, what the line says of the value, what it says to do
    ("name: x", "nodes", "is empty", "list at least one node"),
    ("nodes: []", "nodes", "is empty", "list at least one node"),
    ("nodes: 5", "nodes", "5 is not a list", "write a list"),
    ("nodes: [5]", "nodes[0]", "5 is not a mapping", "KEY: VALUE"),
    ("nodes: [{name: a, gpu: L41, count: 2}]", "nodes[0].gpu", "unknown GPU type 'L41'", "L40S, L4,"),
    ("nodes: [{name: a, gpu: [L40], count: 2}]", "nodes[0].gpu", "['L40'] is not text", "quotes"),
    ("nodes: [{name: a, gpu: L40}]", "nodes[0].count", "is missing", "add 'nodes[0].count'"),
    ("nodes: [{name: a, gpu: L40, count: 0}]", "nodes[0].count", "0 is less than 1", "at least 1"),
    ("nodes: [{name: a, gpu: L40, count: -3}]", "nodes[0].count", "-3 is less than 1", "at least 1"),
    ("nodes: [{name: a, gpu: L40, count: 1.5}]", "nodes[0].count", "1.5 is not a whole number", "whole"),
    ("nodes: [{name: a, gpu: L40, count: 9999}]", "nodes[0].count", "9999 is more than 1024", "at most"),
    (
        "nodes: [" + ", ".join(f"{{name: n{place}, gpu: L40, count: 1024}}" for place in range(9)) + "]",
        "nodes",
        "9216 GPUs are more than 8192",
        "plan parts of it apart",
    ),
    ("nodes: [{name: no, gpu: L40, count: 2}]", "nodes[0].name", "False is not text", "quotes"),
    ("nodes: [{name: '', gpu: L40, count: 2}]", "nodes[0].name", "'' is empty", "give it a value"),
    ("nodes: [{name: a/0, gpu: L40, count: 2}]", "nodes[0].name", "'a/0' has a slash", "leave it out"),
    (NODES.replace("name: b", "name: a"), "nodes[1].name", "'a' is given twice", "its own name"),
    (node("nic_gbps: -5"), "nodes[0].nic_gbps", "-5 is not greater than 0", "greater than 0"),
    (node("nic_gbps: .nan"), "nodes[0].nic_gbps", "nan is not finite", "a finite number"),
    (node("nic_gbps: .inf"), "nodes[0].nic_gbps", "inf is not finite", "a finite number"),
    (node("nic_gbps: 1.0e-9"), "nodes[0].nic_gbps", "1e-09 is less than a kilobit", "gigabits per second"),
    (node("price_per_gpu_hour: 1.0e+300"), "nodes[0].price_per_gpu_hour", "is more than 1e+06", "at most"),
    (network("default: {gbps: 1.0e+300}"), "network.default.gbps", "1e+300 is more than 1e+06", "at most"),
    (node("price_per_gpu_hour: -1"), "nodes[0].price_per_gpu_hour", "-1 is less than 0", "at least 0"),
    (node("intra_link: {gbps: 0}"), "nodes[0].intra_link.gbps", "0 is not greater than 0", "greater"),
    (node("colour: red"), "nodes[0].colour", "is not a known field", "correct its spelling"),
    (f"{NODES}\nnetwrok: {{}}", "netwrok", "is not a known field", "correct its spelling"),
    (f"{NODES}\nnetwork:", "network", "is empty", "give it a value or leave it out"),
    (NODES, "network", "nothing joins 'a' and 'b'", "add network.default"),
    (network("default: {gbps: -10}"), "network.default.gbps", "-10 is not greater than 0", "greater"),
    (network("default: {gbps: fast}"), "network.default.gbps", "'fast' is not a number", "a number"),
    (
        network("default: {gbps: 10, latency_ms: -1}"),
        "network.default.latency_ms",
        "-1 is less than 0",
        "at least 0",
    ),
    (
        network("default: {gbps: 10}, links: [{between: [a, z], gbps: 5}]"),
        "network.links[0].between",
        "there is no node 'z'",
        "name two of a, b",
    ),
    (
        network("links: [{between: [a], gbps: 5}]"),
        "network.links[0].between[1]",
        "is missing",
        "add 'network.links[0].between[1]'",
    ),
    (
        network("links: [{between: [a, b, b], gbps: 5}]"),
        "network.links[0].between",
        "has too many entries",
        "at most 2",
    ),
    (
        network("links: [{between: [a, a], gbps: 5}]"),
        "network.links[0].between",
        "joins 'a' to itself",
        "intra_link",
    ),
    (
        network("links: [{between: [a, b], gbps: 5}, {between: [b, a], gbps: 6}]"),
        "network.links[1].between",
        "a and b are linked twice",
        "keep one",
    ),
    ("gpu_types: {X: 1}\n" + NODES, "gpu_types", "is not a list", "one entry per GPU type"),
    ("gpu_types: [3]\n" + NODES, "gpu_types[0]", "3 is not a mapping", "KEY: VALUE"),
    (
        f"gpu_types: [{TYPE.replace('10', '-1', 1)}]\n{NODES}",
        "gpu_types[0].memory_gib",
        "-1 is not greater than 0",
        "greater than 0",
    ),
    (
        f"gpu_types: [{TYPE.replace('nvidia', 'intel')}]\n{NODES}",
        "gpu_types[0].vendor",
        "'intel' is not known",
        "'nvidia', 'amd' or 'cpu'",
    ),
    (f"gpu_types: [{TYPE}, {TYPE}]\n{NODES}", "gpu_types[1].name", "'X' is given twice", "its own name"),
    (f"{NODES}\ninline_types: []", "inline_types", "is not a known field", "under gpu_types"),
]


@pytest.mark.parametrize(("document", "field", "problem", "mend"), BAD)
def test_a_mistake_is_told_in_one_line(document: str, field: str, problem: str, mend: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_cluster(yaml.safe_load(document), "cluster.yaml")
    line = str(caught.value)
    assert line.startswith(f"cluster.yaml: {field}: ")
    assert problem in line
    assert mend in line.split("; ", 1)[1]
    assert "\n" not in line


def test_the_good_parts_of_the_table_are_good() -> None:
    """What the table breaks loads when it is whole: each row fails for its own reason."""
    parse_cluster(yaml.safe_load(f"{NODES}\n{NETWORK}"), "cluster.yaml")
    parse_cluster(yaml.safe_load(node("nic_gbps: 5, price_per_gpu_hour: 0, host: h")), "cluster.yaml")
    cluster = parse_cluster(
        yaml.safe_load(f"gpu_types: [{TYPE}]\nnodes: [{{name: a, gpu: X, count: 2}}]"), "cluster.yaml"
    )
    assert cluster.gpus[0].type.flops == 5e12


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("- 1\n- 2\n", "holds a list, not a mapping"),
        ("nodes: [\n  {name: a\n", "line 3"),
        ("1: 2\n", "has a key that is not text"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give the path of a cluster file"):
        load_cluster(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a directory"):
        load_cluster(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        load_cluster(tmp_path / "binary.yaml")
