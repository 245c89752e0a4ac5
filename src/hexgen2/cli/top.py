"""``hexgen2 top``: the essentials of a service that runs, in a terminal."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from hexgen2.cli import inputs, output
from hexgen2.specs.errors import InputError
from hexgen2.specs.urls import is_http

TIMEOUT_S = 10.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("top", help="watch a served plan in a terminal", description=__doc__)
    parser.add_argument("url", metavar="URL", help="for instance http://127.0.0.1:8000")
    parser.add_argument("--once", action="store_true", help="print it once and leave")
    parser.add_argument(
        "--every", type=inputs.positive, default=1.0, metavar="S", help="seconds between looks (default: 1)"
    )
    inputs.add_api_key(parser)
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from hexgen2.report.top import top_view

    url, key = state_url(args.url), args.api_key
    state = fetch(url, key, after=None if args.json else 0)
    if args.json:
        output.print_json(state)
    elif args.once or not sys.stdout.isatty():
        output.result_console().print(top_view(state))
    else:
        _watch(url, key, state, args.every)
    return 0


def state_url(url: str) -> str:
    """The address of the figures, from the service's; its `/live` and `/v1` are taken too."""
    base = inputs.service(url)
    for end in ("/live/state", "/live"):
        base = base.removesuffix(end)
    if not is_http(base):
        raise InputError(
            url, "", "is no http:// or https:// address", "give the service's, such as http://127.0.0.1:8000"
        )
    return f"{base}/live/state"


def fetch(url: str, key: str | None, after: int | None = None) -> dict[str, Any]:
    """The state; InputError where nothing that is such a service answers. ``after``: with the history since."""
    try:
        asked = urllib.request.Request(url if after is None else f"{url}?after={after}")
        if key:
            asked.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            state = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise InputError(url, "", "asks for an API key", "give one with --api-key") from None
        raise InputError(url, "", f"answers {error.code}", "give the address of `hexgen2 serve`") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # bad JSON is a ValueError
        reason = getattr(error, "reason", None) or error
        problem = "gives no JSON" if isinstance(error, json.JSONDecodeError) else f"does not answer ({reason})"
        raise InputError(url, "", problem, "give the address of `hexgen2 serve`") from None
    if not isinstance(state, dict) or not {"now", "groups", "events"} <= state.keys():
        raise InputError(url, "", "is no state of a service", "give the address of `hexgen2 serve`")
    return state


def _watch(url: str, key: str | None, state: dict[str, Any], every_s: float) -> None:
    """Show the state again and again, until Ctrl-C. A service that goes away may come back."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from hexgen2.report.top import top_view

    console = output.result_console()
    try:
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            trouble = ""
            while True:
                lines = state["history"]["fine"]
                view = top_view(state, lines)
                live.update(Group(view, Text(trouble, "bold red")) if trouble else view, refresh=True)
                time.sleep(every_s)
                try:
                    state, trouble = fetch(url, key, after=0), ""
                except InputError as error:
                    trouble = f"\n{error.problem}; trying again"
    except KeyboardInterrupt:
        console.print(top_view(state))
