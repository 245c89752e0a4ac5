"""The tests with real engines are skipped where vLLM's CPU build is missing, as in tests/engine."""

from tests.engine.conftest import pytest_collection_modifyitems

__all__ = ["pytest_collection_modifyitems"]
