"""The documentation's commands are commands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hexgen2.cli.main import build_parser
from hexgen2.specs.cluster import parse_cluster
from tests.docs.blocks import PAGES, ROOT, blocks, hexgen2_commands

COMMANDS = [(page.name, command) for page in PAGES for command in hexgen2_commands(page)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_command_is_understood(page: str, command: list[str]) -> None:
    try:
        build_parser().parse_args(command)
    except SystemExit as left:
        pytest.fail(f"{page}: hexgen2 {' '.join(command)} leaves with {left.code}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        other = (page.parent / target) if target else page
        assert other.exists(), f"{page.name} → {target}"
        if anchor and other.suffix == ".md":
            assert anchor in headings(other), f"{page.name} → {target}#{anchor}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def test_the_cluster_file_page_shows_a_cluster_file() -> None:
    first, types = [
        text for _, language, text in blocks(ROOT / "docs" / "cluster-file.md") if language == "yaml"
    ]
    cluster = {**yaml.safe_load(first), **yaml.safe_load(types)}
    cluster["nodes"].append({"name": "c", "gpu": "my-gpu", "count": 2})
    assert len(parse_cluster(cluster, "cluster-file.md").gpus) == 8


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md"]
    assert [name for name in pages if f"({name})" not in index] == [], "add them to docs/README.md"
