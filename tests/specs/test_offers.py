"""The catalog of nodes to rent: what it makes of a mix, and one line for every mistake in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hexgen2.specs import InputError
from hexgen2.specs.cluster import parse_cluster
from hexgen2.specs.offers import load_offers, parse_offers

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "catalogs").glob("*.yaml"))
GOOD = """
name: shop
offers:
  - {name: big, gpu: H100-80G-SXM, count: 8, price_per_gpu_hour: 3, available: 2, region: east, nic_gbps: 100}
  - {name: mid, gpu: A100-80G-PCIe, count: 4, available: 3, region: east}
  - {name: low, gpu: L40, count: 2, price_per_gpu_hour: 0.5, region: west}
network:
  default: {gbps: 1, latency_ms: 30}
  links:
    - {between: [east, east], gbps: 50}
    - {between: [big, mid], gbps: 80}
    - {between: [west, west], gbps: 20}
"""


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_mix_becomes_a_cluster_with_the_links_of_its_offers_and_regions() -> None:
    offers = parse_offers(yaml.safe_load(GOOD), "shop.yaml")
    cluster = offers.cluster((2, 1, 2))
    assert [node.name for node in cluster.nodes] == ["big-1", "big-2", "mid-1", "low-1", "low-2"]
    speeds = {(a, b): cluster.node_link(a, b).bandwidth * 8 / 1e9 for b in range(5) for a in range(b)}
    assert speeds == pytest.approx(
        {(0, 1): 50, (0, 2): 80, (1, 2): 80, (3, 4): 20} | {(a, b): 1 for a in range(3) for b in (3, 4)}
    )
    assert offers.price((2, 1, 2)) == pytest.approx(2 * 8 * 3 + 4 * 1.69 + 2 * 2 * 0.5)
    assert cluster.price_per_hour == pytest.approx(offers.price((2, 1, 2)))
    assert offers.gpus((2, 1, 2)) == len(cluster.gpus) == 24
    assert parse_cluster(cluster.document(), "again") == cluster


BAD = [
    (changed("offers:", "offer:"), "offers", "is empty", "list at least one offer"),
    (changed("name: mid", "name: big"), "offers[1].name", "'big' is given twice", "its own name"),
    (changed("name: mid", "name: m/d"), "offers[1]", "'m/d' has a slash", "leave it out"),
    (changed("gpu: L40,", "gpu: L41,"), "offers[2].gpu", "unknown GPU type 'L41'", "use one of"),
    (changed("available: 3", "available: 0"), "offers[1].available", "0 is less than 1", "at least 1"),
    (changed("available: 3", "availabel: 3"), "offers[1].availabel", "is not a known field", "spelling"),
    (
        changed("price_per_gpu_hour: 3", "price_per_gpu_hour: -3"),
        "offers[0].price_per_gpu_hour",
        "-3",
        "least 0",
    ),
    (
        changed("gpu: L40, count: 2, price_per_gpu_hour: 0.5", "gpu: cpu-1c, count: 2"),
        "offers[2].price_per_gpu_hour",
        "is missing",
        "USD per GPU and hour",
    ),
    (changed("region: west", "region: big"), "offers[2].region", "also the name of an offer", "rename"),
    (
        changed("[west, west]", "[west, wets]"),
        "network.links[2].between",
        "no offer or region 'wets'",
        "name two",
    ),
    (changed("[west, west]", "[west, big]"), "network.links[2].between", "an offer to a region", "two regions"),
    (changed("[west, west]", "[mid, big]"), "network.links[2].between", "linked twice", "keep one"),
    (changed("  default: {gbps: 1, latency_ms: 30}\n", ""), "network", "nothing joins 'big' and 'low'", "add"),
    (changed("gbps: 50", "gbps: 0"), "network.links[0].gbps", "0 is not greater than 0", "greater"),
]


@pytest.mark.parametrize(("text", "field", "problem", "mend"), BAD)
def test_a_mistake_is_one_line_with_the_field_and_the_mend(
    text: str, field: str, problem: str, mend: str, tmp_path: Path
) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_offers(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: {caught.value.field}")
    assert caught.value.field.startswith(field)
    assert problem in line
    assert mend in caught.value.mend


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_catalog_loads_and_says_when_its_prices_were_read(path: Path) -> None:
    offers = load_offers(path)
    text = path.read_text()
    assert "2026-" in text.split("name:")[0]
    assert all(offer.price_per_gpu_hour is not None for offer in offers.offers)
    parse_cluster(offers.cluster([1] * len(offers.offers)).document(), str(path))
