from __future__ import annotations

import pytest

from hexgen2.cost import Efficiencies, Efficiency, Profile, default_efficiency, parse_profile
from hexgen2.cost.profile_files import load_profile
from hexgen2.specs import GpuType, InputError, weakest
from hexgen2.specs.catalog import gpu_type, gpu_type_names

FITTED = Efficiency(
    compute=0.4, attention=0.3, memory=0.9, kv=0.6, link=0.8, layer_overhead_s=1e-3, step_overhead_s=0.0
)


def profile(**gpus: Efficiency) -> Profile:
    return Profile(
        name="p",
        source="here",
        date="2026-01-01",
        engine="vllm",
        gpus={name.replace("_", "-"): kind for name, kind in gpus.items()},
    )


@pytest.mark.parametrize("name", gpu_type_names())
def test_every_catalog_type_has_a_plausible_default(name: str) -> None:
    default = default_efficiency(gpu_type(name))
    for field in ("compute", "attention", "memory", "kv", "link"):
        assert 0.05 <= getattr(default, field) <= 0.9
    assert default.step_overhead_s < 0.01
    if gpu_type(name).vendor != "cpu":
        unknown = default_efficiency(gpu_type(name).model_copy(update={"generation": "nobody knows"}))
        assert default != unknown, "its generation has no entry"


def test_profiles_replace_defaults_and_later_ones_win() -> None:
    a100, h100 = gpu_type("A100-80G-SXM"), gpu_type("H100-80G-SXM")
    second = FITTED.model_copy(update={"compute": 0.7})
    table = Efficiencies([profile(A100_80G_SXM=FITTED), profile(A100_80G_SXM=second)])
    assert table.of(a100) == second
    assert not table.is_default(a100)
    assert table.of(h100) == default_efficiency(h100)
    assert table.is_default(h100)


def test_a_mixed_stage_gets_the_worst_of_its_members() -> None:
    members = [gpu_type("A100-80G-SXM"), gpu_type("H100-80G-SXM")]
    mixed = weakest(members)
    better = FITTED.model_copy(update={"compute": 0.9, "memory": 0.5, "step_overhead_s": 2e-3})
    table = Efficiencies([profile(A100_80G_SXM=FITTED, H100_80G_SXM=better)])
    assert table.of(mixed) == FITTED.model_copy(update={"memory": 0.5, "step_overhead_s": 2e-3})
    assert not table.is_default(mixed)
    assert Efficiencies([profile(A100_80G_SXM=FITTED)]).is_default(mixed)


def test_a_mixed_stage_of_engines_with_other_terms_is_no_faster_than_any() -> None:
    members = [gpu_type("A100-80G-SXM"), gpu_type("H100-80G-SXM")]
    large = FITTED.model_copy(
        update={"link": 0.9, "large_link": 0.85, "large_message_bytes": 1e6, "reduce_hops": 2.0}
    )
    hops = FITTED.model_copy(update={"link": 0.8, "reduce_hops": 3.0, "layer_launch_s": 1e-4})
    mixed = Efficiencies([profile(A100_80G_SXM=large, H100_80G_SXM=hops)]).of(weakest(members))
    assert (mixed.link, mixed.large_link, mixed.large_message_bytes) == (0.8, 0.8, 1e6)
    assert (mixed.reduce_hops, mixed.layer_launch_s) == (3.0, 1e-4)
    ring = Efficiencies([profile(A100_80G_SXM=large, H100_80G_SXM=FITTED)]).of(weakest(members))
    assert ring.reduce_hops is None, "a ring takes more latencies than any number of hops"


@pytest.mark.parametrize(
    ("change", "says"),
    [({"large_link": 0.5}, "go together"), ({"large_link": 0.9, "large_message_bytes": 1e6}, "above link")],
)
def test_large_messages_are_given_whole(change: dict[str, float], says: str, gpu: GpuType) -> None:
    document = profile(**{gpu.name: FITTED}).model_dump()
    document["gpus"][gpu.name] |= change
    with pytest.raises(InputError, match=says):
        parse_profile(document, "f")


def test_ampere_with_gddr_has_its_own_default() -> None:
    assert default_efficiency(gpu_type("A6000")) == default_efficiency(gpu_type("A10G"))
    assert default_efficiency(gpu_type("A6000")) != default_efficiency(gpu_type("A100-80G-PCIe"))


def test_only_switched_nvlink_reduces_in_few_hops() -> None:
    assert default_efficiency(gpu_type("H100-80G-SXM")).reduce_hops is not None
    for name in ("H100-80G-PCIe", "H100-94G-NVL", "V100-32G-SXM", "L40S"):
        assert default_efficiency(gpu_type(name)).reduce_hops is None


@pytest.mark.parametrize("name", ["splitwise-2023", "aiconfigurator-0.12"])
def test_shipped_profiles_are_whole(name: str) -> None:
    shipped = load_profile(name)
    assert shipped.name == name
    assert shipped.source
    assert shipped.date
    assert set(shipped.gpus) == set(shipped.fits) <= set(gpu_type_names())
    for gpu_name, record in shipped.fits.items():
        assert all(error <= 0.08 for error in record.median_error.values())
        for field, (low, high) in record.confidence.items():
            assert low <= getattr(shipped.gpus[gpu_name], field) <= high


def test_a_wrong_profile_names_the_field(gpu: GpuType) -> None:
    document = profile(**{gpu.name: FITTED}).model_dump()
    assert parse_profile(document, "f") == profile(**{gpu.name: FITTED})
    document["gpus"][gpu.name]["compute"] = -1
    with pytest.raises(InputError, match=r"f: gpus\.round\.compute"):
        parse_profile(document, "f")
