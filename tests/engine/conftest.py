"""Engine tests need vLLM's CPU build; without it they are skipped, with the reason (`make test` demands it)."""

from __future__ import annotations

import os

import pytest

from hexgen2.deploy import check_engine
from hexgen2.specs import InputError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        check_engine("cpu", transfers=True)
    except InputError as error:
        if os.environ.get("HEXGEN2_ENGINE_REQUIRED"):
            raise pytest.UsageError(str(error)) from None
        skip = pytest.mark.skip(reason=str(error))
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(skip)
