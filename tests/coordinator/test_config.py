"""The config holds what it says or names the mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hexgen2.coordinator import CoordinatorConfig
from hexgen2.specs.errors import InputError

GOOD: dict[str, Any] = {
    "served_model_names": ["tiny"],
    "engines": [
        {"group_id": "p0", "role": "prefill", "url": "http://127.0.0.1:1/", "share": 0.75},
        {"group_id": "d0", "role": "decode", "url": "http://127.0.0.1:2", "share": 0.75, "max_batch": 8},
        {"group_id": "c0", "role": "colocated", "url": "http://127.0.0.1:3", "share": 0.25},
    ],
    "routes": [{"prefill": "p0", "decode": "d0", "share": 0.75}],
}


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with values replaced; `engines_1_url="x"` means engines[1].url."""
    config = json.loads(json.dumps(GOOD))
    for path, value in changes.items():
        *way, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        place = config
        for part in way:
            place = place[part]
        place[last] = value
    return config


def test_round_trip(tmp_path: Path) -> None:
    config = CoordinatorConfig.model_validate(GOOD)
    config.save(tmp_path / "c.json")
    assert CoordinatorConfig.load(tmp_path / "c.json") == config
    assert config.engine("p0").url == "http://127.0.0.1:1"
    with pytest.raises(KeyError):
        config.engine("zz")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (changed(routes__0__prefill="nobody"), "nobody"),
        (changed(routes__0__prefill="d0"), "is a decode engine"),
        (changed(routes__0__decode="c0"), "is a colocated engine"),
        (changed(routes__0__share=0.5), "sum to 0.75"),
        (changed(engines__1__group_id="p0"), "twice"),
        (changed(engines__0__url="127.0.0.1:1"), "http://"),
        (changed(engines__0__url="http://"), "engines[0].url"),
        (changed(engines__0__url="http://a:99999"), "engines[0].url"),
        (changed(engines__0__role="both"), "engines[0].role"),
        (changed(engines__0__share=-1), "engines[0].share"),
        (changed(served_model_names=[]), "served_model_names"),
        (changed(served_model_names=["a", "a"]), "repeats"),
        (changed(tyop=1), "tyop"),
        (changed(routes=GOOD["routes"] * 2), "twice"),
        (changed(timeouts={"idle_s": 0}), "idle_s"),
    ],
)
def test_mistakes_are_named_in_one_line(config: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError) as caught:
        CoordinatorConfig.from_json(json.dumps(config), "c.json")
    assert str(caught.value).startswith("c.json: ")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        CoordinatorConfig.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(json.dumps(GOOD)[:-20])
    with pytest.raises(InputError, match=r"cut\.json"):
        CoordinatorConfig.load(tmp_path / "cut.json")


def test_shares_may_be_off_by_rounding() -> None:
    CoordinatorConfig.model_validate(changed(routes__0__share=0.75 + 5e-7))
