"""Take the pictures of docs/images: `python -m tools.screenshots [--seconds 220]`.

A plan for 20 GPUs is served by emulated engines, under a load close to what it was planned for, with the
controller on. Near the end a node is lost and returns. Then a headless Chromium takes the live page, while all
of that goes on, and the page of the plan. Needs Chromium (tools/install_chromium.sh) and the extra dev. What is
seen is one run; no figure of the documentation is taken from it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from tests.browser.conftest import CHROMIUM, missing
from tests.browser.looks import PHONE, opened
from tests.browser.service import Service, serving

from hexgen2.cli.main import main as hexgen2
from hexgen2.cli.planning import problem_of
from hexgen2.controller import BOTH, Controller, Flipping
from hexgen2.coordinator import run
from hexgen2.loadgen import Load, measure
from hexgen2.specs.catalog.workloads import load_workload
from hexgen2.specs.plan import Plan, Slo, load_plan

if TYPE_CHECKING:
    from playwright.async_api import Browser

ROOT = Path(__file__).parents[1]
BUILD, IMAGES = ROOT / "build" / "screenshots", ROOT / "docs" / "images"
PLAN = ("--cluster", str(ROOT / "examples/clusters/mixed-1.yaml"), "--model", "llama-2-70b")
WORKLOAD, RPS = "hphd", 3.5
LOST, LOST_S, RETURNS_S = "d3", 75.0, 40.0
"""The group that is lost, and how many seconds before the end that is and it returns."""
DESK = 1240
TOP = 1290
"""Height of the part of the live page that is shown by itself: figures, pictures, charts."""
COLOURS = 256
"""A picture of a page has few colours; with a palette its file is a third as large."""


class Fixed:
    """Engines that are there and stay."""

    def __init__(self, service: Service) -> None:
        self._urls = {group: engine.url for group, engine in service.engines.items()}

    @property
    def urls(self) -> Mapping[str, str]:
        return self._urls

    async def start(self, plan: Plan, groups: Sequence[str]) -> None:
        raise AssertionError(f"{groups} of {plan.model} are to be started")

    async def end(self, groups: Sequence[str]) -> None:
        raise AssertionError(f"{groups} are to be ended")


def controller_of(service: Service) -> Controller:
    """A controller that may change routes and roles."""
    problem = problem_of(service.plan)
    return Controller(
        service.plan,
        problem.lengths,
        problem.cost,
        problem.engine,
        service.coordinator,
        Fixed(service),
        mode="on",
        restarts=False,
        flipping=lambda plan: Flipping({group.id: BOTH for group in plan.groups}),
        tell=lambda decision: (
            None if decision.action == "keep" else service.coordinator.live.tell(decision.text)
        ),
    )


def planned() -> tuple[Plan, Path]:
    """The plan, and its page."""
    plan, trace, page = (BUILD / name for name in ("plan.json", "trace.json", "plan.html"))
    arguments = [*PLAN, "--workload", WORKLOAD, "--solver", "paper", "-o", str(plan), "--trace", str(trace)]
    for command in (["plan", *arguments], ["explain", str(plan), "--html", str(page), "--trace", str(trace)]):
        with contextlib.redirect_stdout(io.StringIO()):
            failed = hexgen2(command)
        if failed:
            raise SystemExit(f"hexgen2 {' '.join(command)} failed")
    return load_plan(plan), page


async def taken(browser: Browser, url: str, name: str, width: int, scheme: str, ready: str) -> None:
    """The picture of a page, as docs/images/NAME.png."""
    async with opened(browser, url, width, scheme) as watched:
        await watched.page.wait_for_selector(ready)
        await watched.page.wait_for_timeout(3000)
        shot = await watched.page.screenshot(full_page=True)
    assert not watched.complaints, watched.complaints
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    written(picture, name)
    if name == "live":
        written(picture.crop((0, 0, picture.width, TOP)), "live-top")


def written(picture: Image.Image, name: str) -> None:
    """The picture as docs/images/NAME.png."""
    path = IMAGES / f"{name}.png"
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


async def take(seconds: float) -> None:
    from playwright.async_api import async_playwright

    plan, page = planned()
    quiet = Console(file=io.StringIO())
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(serving(plan, slowdown=1.0))
        controller = controller_of(service)
        service.coordinator.live.plan = lambda: controller.plan
        load = Load(
            service.url, load_workload(WORKLOAD), round(RPS * (seconds + 120)), RPS, None, 0, None, Slo()
        )
        tasks = [asyncio.create_task(controller.run()), asyncio.create_task(measure(load, quiet))]
        for task in tasks:
            stack.callback(task.cancel)
        await asyncio.sleep(seconds - LOST_S)
        port = service.engines[LOST].port
        await service.lose(LOST)
        await asyncio.sleep(LOST_S - RETURNS_S)
        await service.revive(LOST, port)
        await asyncio.sleep(RETURNS_S)
        playwright = await stack.enter_async_context(async_playwright())
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        live, busy = f"{service.url}/live", "#network .figure"  # KV caches show after some seconds
        await taken(browser, live, "live", DESK, "light", busy)
        await taken(browser, live, "live-dark", DESK, "dark", busy)
        await taken(browser, live, "live-phone", PHONE, "light", busy)
        await taken(browser, page.as_uri(), "report", DESK, "light", "main")
        await taken(browser, page.as_uri(), "report-phone", PHONE, "light", "main")
        await browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.screenshots", description=__doc__)
    parser.add_argument("--seconds", type=float, default=220.0, help="of load before the pictures are taken")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"screenshots: {reason}", file=sys.stderr)
        return 2
    if arguments.seconds <= LOST_S:
        parser.error(f"--seconds: give more than {LOST_S:.0f}")
    logging.disable()  # a lost engine and clients that are broken off at the end are what this is about
    BUILD.mkdir(parents=True, exist_ok=True)
    run(take(arguments.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
