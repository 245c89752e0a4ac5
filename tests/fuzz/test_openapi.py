"""schemathesis over the published description: what it says is what is served, and nothing breaks."""

from __future__ import annotations

from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hexgen2.coordinator.openapi import document
from hexgen2.report.live import page_files
from tests.coordinator.conftest import Stand
from tests.waiting import HUNG_S

# Not asked for: that bad bodies are refused (`negative_data_rejection`). The engine judges those, and the
# emulated one takes what it need not understand.
CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
DESCRIBED = document(("m",), "0", False)["paths"]
GETS, POSTS = ([path for path, methods in DESCRIBED.items() if method in methods] for method in ("get", "post"))


def hold(stand: Stand, path: str, method: str, mode: GenerationMode, examples: int) -> None:
    operation: Any = schemathesis.openapi.from_url(stand.url + "/openapi.json")[path][method]

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def every(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=HUNG_S)

    every()


@pytest.mark.parametrize("path", GETS)
def test_questions(stand: Stand, path: str) -> None:
    hold(stand, path, "get", GenerationMode.POSITIVE, 3)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", POSTS)
def test_requests(stand: Stand, path: str, mode: GenerationMode) -> None:
    hold(stand, path, "post", mode, 25)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", POSTS)
def test_many_requests(stand: Stand, path: str, mode: GenerationMode) -> None:
    hold(stand, path, "post", mode, 400)


def test_every_route_is_described(stand: Stand) -> None:
    described = requests.get(stand.url + "/openapi.json", timeout=HUNG_S).json()["paths"]
    api = stand.coordinator._api
    assert api is not None
    routes = {route.resource.canonical for route in api.application().router.routes() if route.resource}
    refused = ("/v1/embeddings", "/v1/responses", "/v1/audio/", "/v1/rerank", "/openapi.json")
    described |= page_files(False)  # the live page's own files are for people
    assert {path for path in routes if not path.startswith(refused)} == set(described)
