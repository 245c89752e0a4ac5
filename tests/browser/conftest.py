"""A headless Chromium for the tests of this folder; they are skipped, and say why, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from playwright.async_api import Browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HERE = Path(__file__).parent


def missing() -> str | None:
    """Why there is no browser to test with."""
    for name in ("playwright", "axe_playwright_python"):
        if find_spec(name) is None:
            return f"{name.replace('_', '-')} is not installed (it is in the extra dev)"
    if CHROMIUM is None:
        return "there is no Chromium on this machine (tools/install_chromium.sh installs Debian's)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if reason is not None and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        # Chromium's own sandbox does not start for root, as which containers run tests.
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()
