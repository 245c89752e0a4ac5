"""Driving a live engine: what is asked, how times are read, what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hexgen2.calibrate import local
from hexgen2.calibrate.drive import STEPS, Engine, Grid, Timeline, measure
from hexgen2.calibrate.live import fit_live
from hexgen2.calibrate.profile_file import profile_of, profile_text
from hexgen2.cli.calibrate import _layout
from hexgen2.cli.main import main
from hexgen2.cost import StageShape
from hexgen2.cost.profile_files import load_profile
from hexgen2.emulator import EmulatedEngine, EmulatorConfig, LinearTiming
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.catalog.models import load_model
from hexgen2.specs.errors import InputError

GPU = gpu_type("A100-80G-SXM")
MODEL = load_model("llama-2-7b")
LAYOUT = (StageShape(GPU, 1, MODEL.layers),)
SMALL = Grid(longest=600, tokens=1200, batch=2, repeats=1)


def test_a_step_is_timed_while_all_sequences_run() -> None:
    """Two sequences, a token each every 0.1 s; the second joins late, and the first ends early."""
    first = [(0.1 * step, 0) for step in range(1, 9)]
    second = [(0.1 * step, 1) for step in range(4, 15)]
    timeline = Timeline(sorted(first + second))
    assert timeline.all_begun_s(2) == pytest.approx(0.4)
    assert timeline.step_s(2) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("tokens", "batch"),
    [([(0.1, 0), (0.2, 0), (0.3, 0)], 2), ([(0.1, 0), (0.2, 0), (0.3, 1), (0.4, 1)], 2), ([], 1)],
)
def test_sequences_that_did_not_run_together_are_no_measurement(
    tokens: list[tuple[float, int]], batch: int
) -> None:
    with pytest.raises(ValueError, match="sequences"):
        Timeline(tokens).step_s(batch)


@pytest.mark.parametrize("chunk", [1, 2, 4, 7])
@pytest.mark.parametrize("late", [[0], [0, 1, 3], [0, 5, 5, 6]])
def test_tokens_that_come_in_one_chunk_count_each(chunk: int, late: list[int]) -> None:
    """The first token comes alone, then so many at once, with the last of them: steps are as long as if each
    had come by itself, though the sequences' chunks do not come at the same time."""
    tokens = []
    for index, begin in enumerate(late):
        for token in range(40):
            sent = 0 if token == 0 else min(39, -(-token // chunk) * chunk)
            tokens.append((0.1 * (begin + sent), index))
    assert Timeline(sorted(tokens)).step_s(len(late)) == pytest.approx(0.1)


def test_the_grid_stays_within_its_limits() -> None:
    grid = Grid(longest=2100, tokens=9000, batch=8)
    points = grid.points()
    assert {phase for phase, _, _ in points} == {"prefill", "decode"}
    assert all(batch <= 8 and tokens + STEPS + 2 <= 2100 for _, batch, tokens in points)
    assert all(batch * (tokens + STEPS + 2) <= 9000 for _, batch, tokens in points)
    assert len({tokens for phase, _, tokens in points if phase == "decode"}) >= 3


async def test_an_engine_is_driven_through_the_grid(tmp_path: Path) -> None:
    config = EmulatorConfig(timing=LinearTiming(step_base_s=0.002, prefill_per_token_s=1e-5), max_model_len=400)
    told: list[str] = []
    async with EmulatedEngine(config).running() as engine:
        measured = await measure(Engine(engine.url, MODEL, LAYOUT), SMALL, told.append)
        sent = [one.body for one in engine.received]
    expected = Grid(400, SMALL.tokens, SMALL.batch, 1).points()
    assert len(measured) == len(told) == len(expected)
    assert all(one.seconds > 0 for one in measured)
    prompts = [
        tuple(prompt)
        for body in sent
        for prompt in (body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]])
    ]
    assert len(set(prompts)) == len(prompts), "no prompt comes twice: a prefix cache would be measured"
    fitted = fit_live(GPU, measured)
    assert set(fitted.intervals) >= {"compute", "memory", "step_overhead_s"}
    assert "link" not in fitted.intervals, "one GPU says nothing about links"
    file = tmp_path / "mine.yaml"
    file.write_text(
        profile_text(profile_of("mine", "here", "emulated", "2026-01-01", {GPU.name: (measured, fitted)}))
    )
    assert load_profile(str(file)).gpus[GPU.name].compute == pytest.approx(fitted.efficiency.compute, rel=1e-3)


async def test_no_repeat_has_the_length_of_one_before() -> None:
    async with EmulatedEngine(EmulatorConfig(max_model_len=400)).running() as engine:
        measured = await measure(Engine(engine.url, MODEL, LAYOUT), Grid(400, 1200, 1, repeats=3))
        sent = [one.body for one in engine.received if one.body["max_tokens"] == 1]
    assert [len(body["prompt"]) for body in sent] == [32, 128, 256, 31, 127, 255, 30, 126, 254]
    lengths = [one.tokens for one in measured if one.phase == "prefill"]
    assert all(
        nominal - 2 <= length <= nominal for nominal, length in zip((32, 128, 256), lengths, strict=True)
    )


async def test_what_the_engine_refuses_is_left_out_and_told() -> None:
    told: list[str] = []
    async with EmulatedEngine(EmulatorConfig(max_model_len=1000, kv_tokens=320)).running() as engine:
        measured = await measure(Engine(engine.url, MODEL, LAYOUT), SMALL, told.append)
    assert measured
    assert any("left out: HTTP 400" in line for line in told)


async def test_nobody_at_the_url_is_a_users_mistake() -> None:
    with pytest.raises(InputError, match="is no OpenAI-compatible endpoint"):
        await measure(Engine("http://127.0.0.1:9", MODEL, LAYOUT), SMALL)


@pytest.mark.parametrize(("tp", "pp", "layers"), [(1, 1, [32]), (2, 1, [32]), (1, 3, [11, 11, 10])])
def test_layouts_are_plans_of_one_group(tp: int, pp: int, layers: list[int]) -> None:
    plan = local.one_group(GPU.name, MODEL, MODEL.name, tp, pp)
    layout = local.layout_of(plan)
    assert [stage.layers for stage in layout] == layers
    assert all(stage.tp == tp and stage.gpu == GPU for stage in layout)
    assert [stage.upstream is not None for stage in layout] == [place > 0 for place in range(pp)]
    with pytest.raises(InputError, match="32 layers"):
        local.one_group(GPU.name, MODEL, MODEL.name, 1, 33)


@pytest.mark.parametrize(("text", "layout"), [("2x1", (2, 1)), ("4X2", (4, 2)), ("3", (3, 1))])
def test_layouts_are_written_tp_x_pp(text: str, layout: tuple[int, int]) -> None:
    assert _layout(text) == layout


@pytest.mark.parametrize("text", ["", "x2", "0x1", "axb"])
def test_other_layouts_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not TPxPP"):
        _layout(text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give URLs, or --local"),
        (["--local", "http://x"], "give URLs, or --local"),
        (["http://x", "--gpu", "H1"], "unknown GPU type 'H1'"),
        (["http://x", "--layout", "1x1", "--layout", "2x1"], "give one for each URL"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["calibrate", "--model", "tiny-llama", "-o", str(tmp_path / "p.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
