"""The fit finds the efficiencies that made the times, and says what it cannot know."""

from __future__ import annotations

import numpy as np
import pytest

from hexgen2.calibrate.fit import Measured, errors_of, fit
from hexgen2.cost import CostModel, Efficiencies, Efficiency, Profile, StageShape, default_efficiency
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model

GPU = gpu_type("A100-80G-SXM")
MODEL = load_model("llama-2-13b")
START = default_efficiency(GPU)
TRUTH = START.model_copy(
    update={
        "compute": 0.55,
        "memory": 0.68,
        "kv": 0.5,
        "link": 0.6,
        "layer_overhead_s": 9e-5,
        "step_overhead_s": 4e-3,
    }
)
FREE = ("compute", "memory", "kv", "link", "layer_overhead_s", "step_overhead_s")
POINTS = [("prefill", batch, tokens) for batch, tokens in ((1, 128), (1, 512), (1, 2048), (1, 8000), (4, 1024))]
POINTS += [("decode", batch, tokens) for batch in (1, 8, 64, 256) for tokens in (128, 1024, 4096)]


def times_of(truth: Efficiency, noise: float = 0.0, seed: int = 0) -> list[Measured]:
    profile = Profile(name="truth", source="", date="", engine="", gpus={GPU.name: truth})
    cost = CostModel(MODEL, Efficiencies([profile]))
    rng = np.random.default_rng(seed)
    found: list[Measured] = []
    for tp in (1, 2, 4):
        layout = (StageShape(GPU, tp, MODEL.layers, GPU.link if tp > 1 else None),)
        for phase, batch, tokens in POINTS:
            exact = Measured(MODEL, "prefill" if phase == "prefill" else "decode", layout, batch, tokens, 1.0)
            seconds = exact.predicted(cost) * float(np.exp(noise * rng.standard_normal()))
            found.append(Measured(MODEL, exact.phase, layout, batch, tokens, seconds))
    return found


def test_exact_times_give_back_their_efficiencies() -> None:
    found = fit(GPU.name, times_of(TRUTH), START, FREE)
    for name in ("compute", "memory", "kv"):
        assert getattr(found.efficiency, name) == pytest.approx(getattr(TRUTH, name), rel=0.02)
    assert max(map(abs, found.errors)) < 0.02


def test_wild_measurements_do_not_decide() -> None:
    measured = times_of(TRUTH, noise=0.02)
    wild = [
        Measured(
            MODEL, one.phase, one.layout, one.batch, one.tokens, one.seconds * (8 if place % 10 == 3 else 1)
        )
        for place, one in enumerate(measured)
    ]
    found = fit(GPU.name, wild, START, FREE)
    assert np.median(np.abs(errors_of(GPU.name, measured, found.efficiency))) < 0.03
    for name in ("compute", "memory"):
        assert getattr(found.efficiency, name) == pytest.approx(getattr(TRUTH, name), rel=0.06)


def test_intervals_hold_the_truth_and_tell_what_is_unknown() -> None:
    measured = [one for one in times_of(TRUTH, noise=0.02, seed=2) if one.layout[0].tp == 1]
    found = fit(GPU.name, measured, START, FREE)
    for name in ("compute", "memory", "kv"):
        interval = found.intervals[name]
        assert interval.low <= getattr(TRUTH, name) <= interval.high
        assert interval.known
    assert not found.intervals["link"].known, "one GPU says nothing about links"
    assert found.efficiency.link == pytest.approx(START.link, rel=0.01)


def test_what_is_not_free_stays() -> None:
    found = fit(GPU.name, times_of(TRUTH), START, ("compute", "memory"))
    same = found.efficiency.model_copy(update={"compute": START.compute, "memory": START.memory})
    assert same == START


def test_host_and_device_are_told_apart() -> None:
    """A launch-bound engine: decode at the host's pace on many GPUs, at the device's on one."""
    truth = TRUTH.model_copy(update={"layer_launch_s": 3e-4, "layer_overhead_s": 2e-5})
    free = ("compute", "memory", "layer_launch_s")
    start = truth.model_copy(update={"compute": 0.7, "memory": 0.75, "layer_launch_s": 1e-4})
    found = fit(GPU.name, times_of(truth, noise=0.01), start, free)
    assert found.efficiency.layer_launch_s == pytest.approx(3e-4, rel=0.03)
    assert found.efficiency.memory == pytest.approx(truth.memory, rel=0.03)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to fit"):
        fit(GPU.name, [], START, FREE)
