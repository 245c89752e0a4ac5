"""The page of a plan in a real browser: at desktop and phone width, by keyboard, without a complaint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hexgen2.report.page import Trace, TracePoint, plan_page
from hexgen2.scheduler.schedule import schedule
from hexgen2.specs.plan import Plan, parse_plan
from tests.browser.looks import DESK, FAULTS, PHONE, opened
from tests.scheduler.support import A100, A6000, H100, L40, cluster, lengths, problem

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytestmark = pytest.mark.asyncio(loop_scope="module")


def pages() -> dict[str, Plan]:
    """A plan with KV routes over links, also with long names, a pipeline, many groups."""
    load = lengths(count=16)
    mixed = cluster((H100, 2), (A100, 4), (A6000, 4), (L40, 2), gbps=10)
    single = cluster((A6000, 1), (A6000, 1), (L40, 1), gbps=25)
    many = cluster(*((kind, 2) for kind in (H100, A100, L40, A6000) for _ in range(5)), gbps=25)
    routed = schedule(problem(mixed, load=load), solver="paper")
    long_names = re.sub(r'"n(\d)(/\d+)?"', r'"gpu-node-with-a-long-name-\1\2"', json.dumps(routed.document()))
    return {
        "long names": parse_plan(json.loads(long_names), "renamed"),
        "routes": routed,
        "pipeline": schedule(problem(single, load=load)),
        "many": schedule(problem(many, load=load), solver="distserve"),
    }


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return pages()


def written(plan: Plan, folder: Path) -> str:
    """The address of the plan's page."""
    trace = Trace((TracePoint(seconds=0.1, phase="start", value=plan.throughput_rps),), 0.5)
    path = folder / "plan.html"
    path.write_text(plan_page(plan, trace), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["routes", "long names", "pipeline", "many"])
async def test_nothing_is_cut_off_or_lies_over_something_else(
    name: str, width: int, plans: dict[str, Plan], tmp_path: Path, browser: Browser
) -> None:
    async with opened(browser, written(plans[name], tmp_path), width) as watched:
        found = await watched.measured()
    assert found["texts"] >= 10
    assert found["scroll"] <= width
    for fault in FAULTS:
        assert found[fault] == [], f"{fault}: {found[fault]}"
    assert watched.complaints == []
    assert len(watched.loaded) == 1, "it loads nothing but itself"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_puts_no_barrier_in_the_way(
    scheme: str, plans: dict[str, Plan], tmp_path: Path, browser: Browser
) -> None:
    async with opened(browser, written(plans["routes"], tmp_path), scheme=scheme) as watched:
        for summary in await watched.page.locator("summary").all():
            await summary.click()
        assert await watched.barriers() == []


async def test_all_of_it_can_be_opened_by_keyboard(
    plans: dict[str, Plan], tmp_path: Path, browser: Browser
) -> None:
    async with opened(browser, written(plans["routes"], tmp_path)) as watched:
        page = watched.page
        stops = await watched.tabbed()
        assert {stop["tag"] for stop in stops} == {"summary"}
        assert all(stop["shown"] and stop["inView"] for stop in stops)
        hidden = page.locator("details table").first
        assert not await hidden.is_visible()
        await page.locator("summary").first.focus()
        await page.keyboard.press("Enter")
        assert await hidden.is_visible()
    assert watched.complaints == []
