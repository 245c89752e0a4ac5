"""The live page in a real browser, before emulated engines under load: what it shows, how it is used, what it
says when things go wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from hexgen2.coordinator import ApiKeys
from hexgen2.specs.plan import load_plan
from tests.browser.looks import DESK, FAULTS, PHONE, Watched, opened
from tests.browser.service import Service, serving

if TYPE_CHECKING:
    from playwright.async_api import Browser, Locator

pytestmark = pytest.mark.asyncio(loop_scope="module")
PLAN = load_plan(Path(__file__).parents[1] / "simulator" / "plan_20_gpus.json")
CHARTS = 6
PATIENCE_MS = 60_000  # the tests' machine may be busy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service() -> AsyncIterator[Service]:
    """A service that has answered requests for some seconds, and goes on."""
    async with serving(PLAN) as service, service.loaded():
        yield service


async def shown(watched: Watched) -> None:
    """Wait until requests show in the pictures and figures."""
    await watched.page.wait_for_selector("#flows .ribbon.real")
    await watched.page.wait_for_selector("#network .figure")


def answered(watched: Watched) -> Locator:
    """Where the page shows how many requests were answered."""
    return watched.page.locator("#figures div", has_text="answered").locator("dd")


async def test_it_shows_the_plan_and_follows_the_load(service: Service, browser: Browser) -> None:
    from playwright.async_api import expect

    async with opened(browser, service.url + "/live") as watched:
        page = watched.page
        await shown(watched)
        assert await page.locator("h1").inner_text() == PLAN.model
        assert await page.locator("#status").inner_text() == "serving"
        assert await page.locator("#groups tr").count() == len(PLAN.groups)
        assert await page.locator(".chart path.a").count() >= CHARTS
        line = page.locator(".chart path.a").nth(1)
        before, drawn = await answered(watched).text_content(), await line.get_attribute("d")
        await expect(answered(watched)).not_to_have_text(before or "", timeout=PATIENCE_MS)
        await expect(line).not_to_have_attribute("d", drawn or "", timeout=PATIENCE_MS)
    assert watched.complaints == []
    assert all(url.startswith((service.url, "data:")) for url in watched.loaded), "nothing from elsewhere"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
async def test_nothing_is_cut_off_or_lies_over_something_else(
    width: int, scheme: str, service: Service, browser: Browser
) -> None:
    async with opened(browser, service.url + "/live", width, scheme) as watched:
        await shown(watched)
        await watched.page.locator("summary").click()
        found = await watched.measured()
        ground = await watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert await watched.barriers() == []
    assert found["scroll"] <= width
    for fault in FAULTS:
        assert found[fault] == [], f"{fault}: {found[fault]}"
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert watched.complaints == []


async def test_it_can_be_used_by_keyboard_alone(service: Service, browser: Browser) -> None:
    async with opened(browser, service.url + "/live") as watched:
        page = watched.page
        await shown(watched)
        stops = await watched.tabbed()
        names = [stop["name"] for stop in stops]
        assert names[:3] == ["Skip to the figures", "pause", "fine"]
        assert [stop["tag"] for stop in stops].count("svg") == CHARTS
        assert names[-1] == "routes-summary"
        assert all(stop["shown"] and stop["inView"] for stop in stops), stops

        await page.locator("#pause").focus()
        await page.keyboard.press("Space")
        assert await page.locator("#pause").get_attribute("aria-pressed") == "true"
        assert (await page.locator("#status").inner_text()).startswith("paused at")
        still = await answered(watched).inner_text()
        await page.locator(".chart svg").first.focus()
        latest = await page.locator(".chart svg").first.get_attribute("aria-valuetext")
        await page.keyboard.press("Home")
        assert await page.locator(".chart svg").first.get_attribute("aria-valuetext") != latest
        assert "answered" in await page.locator(".chart .readout").first.inner_text()
        await page.keyboard.press("Escape")
        assert await page.locator(".chart .readout").first.inner_text() == ""
        assert await answered(watched).inner_text() == still, "it is paused"
        assert (await page.locator("#status").inner_text()).startswith("paused at")

        await page.locator("input[value=fine]").focus()
        await page.keyboard.press("ArrowRight")
        assert await page.locator(".chart .tick", has_text="−45 min").count() == CHARTS
        await page.locator("summary").focus()
        await page.keyboard.press("Enter")
        assert await page.locator("#routes tr").count() == len(PLAN.routes)
    assert watched.complaints == []


async def test_a_lost_engine_is_an_event_and_so_is_its_return(service: Service, browser: Browser) -> None:
    async with opened(browser, service.url + "/live") as watched:
        page = watched.page
        await shown(watched)
        port = service.engines["d3"].port
        await service.lose("d3")
        await page.wait_for_selector("#events .kind.down")
        await page.wait_for_selector("#flows .box.decode.down")
        told = await page.locator("#events").inner_text()
        assert "d3 is down" in told
        assert "node l40 is lost" in told
        assert "5 of 6" in await page.locator("#figures").inner_text()
        assert "down" in await page.locator("#groups tr", has_text="d3").inner_text()
        await service.revive("d3", port)
        await page.wait_for_selector("#events .kind.up")
        assert await watched.barriers() == []
    assert watched.complaints == []


async def test_with_keys_on_the_page_asks_for_one(browser: Browser) -> None:
    async with serving(PLAN, ApiKeys(["right"])) as service, opened(browser, service.url + "/live") as watched:
        page = watched.page
        await page.wait_for_selector("#key-form:not([hidden])")
        assert not await page.locator("#main").is_visible()
        assert watched.complaints == [], "it asks before it is refused"
        await page.locator("#key").fill("wrong")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#trouble:not([hidden])")
        assert await page.locator("#trouble").inner_text() == "This key is not known here."
        await page.locator("#key").fill("right")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#groups tr")
        assert not await page.locator("#key-form").is_visible()


async def test_when_the_service_ends_the_page_says_so_and_keeps_what_it_showed(browser: Browser) -> None:
    async with serving(PLAN) as service:
        page_context = opened(browser, service.url + "/live")
        watched = await page_context.__aenter__()
        await watched.page.wait_for_selector("#groups tr")
    await watched.page.wait_for_selector("#status.lost")
    assert "does not answer" in await watched.page.locator("#trouble").inner_text()
    assert await watched.page.locator("#groups tr").count() == len(PLAN.groups)
    await page_context.__aexit__(None, None, None)
