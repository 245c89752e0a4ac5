"""How long a prompt is taken to be, and what is learned from the answers."""

from __future__ import annotations

from typing import Any

import pytest

from hexgen2.coordinator.config import CoordinatorConfig, EngineEndpoint
from hexgen2.coordinator.fleet import Fleet, Want
from hexgen2.coordinator.request import ClientRequest
from hexgen2.coordinator.sizes import SizeEstimator
from hexgen2.coordinator.stream import prompt_tokens
from hexgen2.specs.classes import RequestClass, RequestSize


def request(chat: bool = False, **body: Any) -> ClientRequest:
    endpoint = "/v1/chat/completions" if chat else "/v1/completions"
    return ClientRequest(endpoint, body, b"", {}, "id", False, None)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        (request(prompt="x" * 40, max_tokens=7), RequestSize(10, 7)),
        (request(prompt="x" * 40), RequestSize(10, 16)),  # /v1/completions answers 16 tokens unless told
        (request(prompt=[1, 2, 3], max_tokens=7), RequestSize(3, 7)),
        (request(prompt=[[1, 2], [3]]), RequestSize(3, 16)),
        (request(prompt=["x" * 4, "y" * 8]), RequestSize(3, 16)),
        (request(prompt_embeds="…", max_tokens=1), RequestSize(None, 1)),
        (request(chat=True, messages=[{"role": "user", "content": "x" * 40}]), RequestSize(10, None)),
        (
            request(
                chat=True,
                messages=[
                    {"role": "user", "content": [{"type": "text", "text": "x" * 20}, {"type": "image_url"}]},
                    {"role": "assistant", "content": None},
                ],
                max_completion_tokens=3,
                max_tokens=5,
            ),
            RequestSize(5, 3),
        ),
        (request(chat=True, messages="nonsense"), RequestSize(None, None)),
    ],
)
def test_sizes(asked: ClientRequest, size: RequestSize) -> None:
    assert SizeEstimator().size(asked) == size


def test_the_mean_follows_what_engines_count() -> None:
    estimator = SizeEstimator()
    chinese = request(prompt="字" * 3000)
    for _ in range(20):
        estimator.observe(chinese, 2000)
    assert estimator.characters_per_token == pytest.approx(1.5, rel=0.05)
    for _ in range(2000):
        estimator.observe(request(prompt="x" * 8000), 2000)
    assert estimator.characters_per_token == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("count", [None, 0])
def test_answers_without_a_count_teach_nothing(count: int | None) -> None:
    estimator = SizeEstimator()
    estimator.observe(request(prompt="x" * 8000), count)
    estimator.observe(request(prompt=[1] * 800), 800)
    assert estimator.characters_per_token == 4


def test_usage_in_an_answer() -> None:
    assert prompt_tokens(b'{"usage": {"prompt_tokens": 12, "completion_tokens": 3}}') == 12
    assert prompt_tokens(b"{}") is None


def test_the_fleet_routes_by_class() -> None:
    classes = (
        RequestClass(name="short", prompt_to=100, fraction=0.5),
        RequestClass(name="long", prompt_from=100, fraction=0.5),
    )
    engines = tuple(
        EngineEndpoint(
            group_id=name, role="colocated", url=f"http://{name}", share=0.5, class_shares={one: 1.0}
        )
        for name, one in (("c0", "short"), ("c1", "long"))
    )
    config = CoordinatorConfig(served_model_names=("m",), engines=engines, classes=classes)
    assert CoordinatorConfig.from_json(config.to_json()) == config
    fleet = Fleet(config)
    for engine in fleet.engines.values():
        fleet.mark_up(engine)
    for prompt, group in ((5, "c0"), (500, "c1")):
        for _ in range(5):
            path = fleet.choose(Want(size=RequestSize(prompt, None)))
            assert path is not None
            assert path.target == group
    fleet.mark_down(fleet.engines["c1"], "test")
    path = fleet.choose(Want(size=RequestSize(500, None)))
    assert path is not None
    assert path.target == "c0"


def test_a_class_whose_engines_are_full_waits_and_the_other_does_not() -> None:
    classes = (
        RequestClass(name="short", prompt_to=100, fraction=0.5),
        RequestClass(name="long", prompt_from=100, fraction=0.5),
    )
    engines = tuple(
        EngineEndpoint(
            group_id=name,
            role="colocated",
            url=f"http://{name}",
            share=0.5,
            max_batch=2,
            class_shares={one: 1.0},
        )
        for name, one in (("c0", "short"), ("c1", "long"))
    )
    fleet = Fleet(CoordinatorConfig(served_model_names=("m",), engines=engines, classes=classes))
    for engine in fleet.engines.values():
        fleet.mark_up(engine)
    short, long = Want(size=RequestSize(5, None)), Want(size=RequestSize(500, None))
    assert fleet.lane(short) != fleet.lane(long)
    assert [fleet.place(short) is None for _ in range(4)] == [False, False, False, True]
    assert fleet.place(long) is not None
    fleet.mark_down(fleet.engines["c0"], "gone")
    spilled = fleet.place(short)
    assert spilled is not None
    assert spilled.path.target == "c1"
