"""The second leg, timed: what is asked of both engines, and what the fit makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hexgen2.calibrate.drive import Engine
from hexgen2.calibrate.fit import Measured
from hexgen2.calibrate.handoff import measure_handoff
from hexgen2.calibrate.live import fit_live
from hexgen2.cost import CostModel, Efficiencies, Profile, StageShape, default_efficiency
from hexgen2.emulator import EmulatedEngine, EmulatorConfig, LinearTiming
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import Link

GPU = gpu_type("cpu-1c")
MODEL = load_model("tiny-llama")
LAYOUT = (StageShape(GPU, 1, MODEL.layers),)
LINK = Link(bandwidth=1e8, latency=1e-4)


async def test_both_legs_are_asked_as_the_coordinator_asks_them() -> None:
    slow = EmulatorConfig(timing=LinearTiming(kv_per_token_s=1e-4))
    async with EmulatedEngine().running() as prefill, EmulatedEngine(slow).running() as decode:
        engine = Engine(decode.url, MODEL, LAYOUT)
        measured = await measure_handoff(prefill.url, engine, LINK, (100, 400), repeats=2)
        legs = [[one.body["kv_transfer_params"] for one in each.received] for each in (prefill, decode)]
    assert [(one.phase, one.tokens) for one in measured] == [("handoff", 100), ("handoff", 400)]
    assert measured[0].seconds >= 0.010
    assert measured[1].seconds >= 0.040
    assert len(legs[0]) == len(legs[1]) == 1 + 2 * 2
    assert all(leg["do_remote_decode"] for leg in legs[0])
    assert all(leg["do_remote_prefill"] and leg["remote_engine_id"] == prefill.engine_id for leg in legs[1])


async def test_an_engine_that_hands_nothing_over_is_told_of() -> None:
    async with EmulatedEngine().running() as prefill:
        engine = Engine(prefill.url, MODEL, LAYOUT)
        with pytest.raises(InputError, match="hands over no KV cache"):
            await measure_handoff(prefill.url, engine, LINK, (5_000_000,))


def test_the_fit_finds_what_taking_over_costs() -> None:
    """Times that the cost model gives for known efficiencies come back."""
    true = default_efficiency(GPU).model_copy(
        update={
            "sequence_overhead_s": 2e-4,
            "request_overhead_s": 4e-3,
            "prompt_overhead_s": 2e-3,
            "layer_launch_s": 1e-5,
            "handoff_overhead_s": 0.015,
        }
    )
    profile = Profile(name="true", source="", date="", engine="", gpus={GPU.name: true})
    cost = CostModel(MODEL, Efficiencies([profile]))
    points = [
        Measured(MODEL, phase, LAYOUT, batch, tokens, 1.0, LINK if phase == "handoff" else None)
        for phase, batch, tokens in (
            *(("prefill", batch, tokens) for batch in (1, 4, 8) for tokens in (32, 128, 512, 1024)),
            *(("decode", batch, tokens) for batch in (1, 4, 16) for tokens in (64, 512, 1024)),
            *(("handoff", 1, tokens) for tokens in (64, 256, 1024)),
        )
    ]
    points = [replace(point, seconds=point.predicted(cost)) for point in points]
    fitted = fit_live(GPU, points)
    assert fitted.efficiency.handoff_overhead_s == pytest.approx(0.015, rel=0.1)
    assert max(map(abs, fitted.errors)) < 0.05
