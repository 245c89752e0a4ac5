"""Hand-overs, measured: what is asked of both engines, what their work lost, and what the fit makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from hexgen2.calibrate import handoff
from hexgen2.calibrate.drive import Engine
from hexgen2.calibrate.fit import Measured
from hexgen2.calibrate.handoff import Handed, Handoffs, measure_handoffs
from hexgen2.calibrate.handoff_fit import token_bytes
from hexgen2.calibrate.live import fit_live
from hexgen2.cost import CostModel, StageShape
from hexgen2.emulator import EmulatedEngine, EmulatorConfig, LinearTiming
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.errors import InputError
from hexgen2.specs.gpu import Link

GPU = gpu_type("cpu-1c")
MODEL = load_model("tiny-llama")
LAYOUT = (StageShape(GPU, 1, MODEL.layers),)
LINK = Link(bandwidth=1e8, latency=1e-4)
TOKEN_BYTES = token_bytes(CostModel(MODEL), LAYOUT)


@pytest.fixture
async def prefill() -> AsyncIterator[EmulatedEngine]:
    async with EmulatedEngine(EmulatorConfig(timing=LinearTiming(prefill_base_s=0.002))).running() as engine:
        yield engine


async def test_both_legs_are_asked_as_the_coordinator_asks_them(
    prefill: EmulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And both engines have other work meanwhile: the one prompts, the other answers."""
    monkeypatch.setattr(handoff, "PACE", 4)
    monkeypatch.setattr(handoff, "CACHES", 2)
    async with EmulatedEngine(EmulatorConfig(timing=LinearTiming(step_base_s=0.002))).running() as decode:
        engines = [Engine(one.url, MODEL, LAYOUT) for one in (prefill, decode)]
        found = await measure_handoffs(*engines, LINK, (100, 400), repeats=2)
        asked = [[one.body for one in each.received] for each in (prefill, decode)]
    assert [(one.tokens, len(one.lost_s), len(one.wait_s)) for one in found.sent] == [(100, 2, 0), (400, 2, 0)]
    assert [(one.tokens, len(one.lost_s), len(one.wait_s)) for one in found.received] == [
        (100, 2, 2),
        (400, 2, 2),
    ]
    legs = [[body["kv_transfer_params"] for body in each if "kv_transfer_params" in body] for each in asked]
    assert len(legs[0]) == len(legs[1]) == 1 + 2 * 2 * 2
    assert all(leg["do_remote_decode"] for leg in legs[0])
    assert all(leg["do_remote_prefill"] and leg["remote_engine_id"] == prefill.engine_id for leg in legs[1])
    work = [[body for body in each if "kv_transfer_params" not in body] for each in asked]
    assert {body["max_tokens"] for body in work[0]} == {1}
    assert len(work[1]) == 4 * handoff.SEQUENCES


async def test_an_engine_that_hands_nothing_over_is_told_of(prefill: EmulatedEngine) -> None:
    engine = Engine(prefill.url, MODEL, LAYOUT)
    with pytest.raises(InputError, match="refuses a prompt"):
        await measure_handoffs(engine, engine, LINK, (1_100_000,))


async def test_work_that_ends_early_is_told_of() -> None:
    """Nobody waits for ever for an engine whose sequences have come to their end."""
    work = handoff._Work()

    async def short() -> None:
        work.done()

    async with work.running([short()]):
        with pytest.raises(InputError, match="ended while it was watched"):
            await asyncio.wait_for(work.more(2), 30)


def test_what_work_lost_is_beyond_its_pace_before_and_after() -> None:
    """10 units a second before and 5 after: on average 15 units in 2 s. Then 3 units in 1 s lost 0.6 s."""
    mark = handoff._Mark
    lost = handoff._lost(mark(0, 0.0), mark(10, 1.0), mark(13, 2.0), mark(18, 3.0))
    assert lost.unit_s == pytest.approx(2 / 15)
    assert lost.seconds == pytest.approx(1 - 3 * 2 / 15)


def measured() -> list[Measured]:
    cost = CostModel(MODEL)
    points = [("prefill", 1, 64), ("prefill", 4, 512), ("decode", 1, 64), ("decode", 8, 512)]
    found = []
    for phase, batch, tokens in points:
        seconds = (
            cost.prefill_seconds(LAYOUT, [tokens] * batch)
            if phase == "prefill"
            else cost.decode_step_seconds(LAYOUT, batch, batch * tokens)
        )
        found.append(
            Measured(MODEL, "prefill" if phase == "prefill" else "decode", LAYOUT, batch, tokens, seconds)
        )
    return found


def handoffs(fixed_s: float, byte_s: float, noise_s: float = 0.0) -> Handoffs:
    """Both sides lose so much, and the request waits twice as long."""
    rng = np.random.default_rng(0)

    def handed(tokens: int, factor: float) -> tuple[float, ...]:
        seconds = factor * (fixed_s + tokens * TOKEN_BYTES * byte_s)
        return tuple((seconds + noise_s * rng.normal(size=5)).tolist())

    lengths = (64, 256, 448)
    sent = tuple(Handed(LAYOUT, tokens, handed(tokens, 1)) for tokens in lengths)
    received = tuple(Handed(LAYOUT, tokens, handed(tokens, 1), handed(tokens, 2)) for tokens in lengths)
    return Handoffs(sent, received)


def test_the_fit_finds_what_hand_overs_cost() -> None:
    fitted = fit_live(GPU, measured(), [handoffs(0.004, 5e-9)])
    found = fitted.efficiency
    assert (found.send_overhead_s, found.send_byte_s) == pytest.approx((0.004, 5e-9))
    assert (found.handoff_wait_s, found.handoff_wait_byte_s) == pytest.approx((0.008, 1e-8))
    # Less what the sequence itself adds to the step that it joins.
    assert 0.5 * 0.004 < found.handoff_overhead_s < 0.004
    assert 0.5 * 5e-9 < found.handoff_byte_s < 5e-9
    assert max(fitted.apart.values()) < 1e-6


def test_noise_shows_in_the_confidence_and_no_cost_is_below_zero() -> None:
    fitted = fit_live(GPU, measured(), [handoffs(0.0, 0.0, noise_s=0.002)])
    for name in ("send_overhead_s", "send_byte_s", "handoff_overhead_s", "handoff_byte_s", "handoff_wait_s"):
        assert 0 <= getattr(fitted.efficiency, name) < 0.004
        interval = fitted.intervals[name]
        assert interval.low <= interval.value <= interval.high
    assert fit_live(GPU, measured()).efficiency.send_overhead_s == 0
