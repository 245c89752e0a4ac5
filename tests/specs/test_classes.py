"""Request classes: what belongs to one, shares that must add up, and routing by them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_documents import plan_document

from hexgen2.specs import InputError, parse_plan
from hexgen2.specs.classes import RequestClass, RequestSize
from hexgen2.specs.routing import ClassRouter, Path

SHORT = RequestClass(name="short", prompt_to=512, fraction=0.75)
LONG_ASK_LITTLE = RequestClass(name="long-little", prompt_from=512, output_to=128, fraction=0.2)
LONG_ASK_MUCH = RequestClass(name="long-much", prompt_from=512, output_from=128, fraction=0.05)
CLASSES = (SHORT, LONG_ASK_LITTLE, LONG_ASK_MUCH)
PATHS = (
    Path("p", "d", 0.5, {"short": 0.6, "long-little": 0.0, "long-much": 1.0}),
    Path(None, "c", 0.5, {"short": 0.4, "long-little": 1.0}),
)


def everywhere(_: Path) -> bool:
    return True


@pytest.mark.parametrize(
    ("prompt", "asked", "names"),
    [
        (1, 1, ["short"]),
        (511, 10_000, ["short"]),
        (511.6, 1, ["short"]),
        (512, 127, ["long-little"]),
        (512, 128, ["long-much"]),
        (9999, None, ["long-little", "long-much"]),
        (None, 127, ["short", "long-little"]),
        (None, None, ["short", "long-little", "long-much"]),
    ],
)
def test_what_may_belong(prompt: float | None, asked: int | None, names: list[str]) -> None:
    assert [one.name for one in CLASSES if one.may_contain(RequestSize(prompt, asked))] == names


@pytest.mark.parametrize("ends", [{"prompt_from": 5, "prompt_to": 5}, {"output_from": 9, "output_to": 2}])
def test_a_class_without_requests_is_refused(ends: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no request is in the class"):
        RequestClass(name="x", fraction=1, **ends)


class TestRouter:
    @pytest.mark.parametrize(
        ("size", "share_of_pair"),
        [
            (RequestSize(100, 5), 0.6),
            (RequestSize(1000, 5), 0.0),
            (RequestSize(1000, 500), 1.0),
            (RequestSize(1000), 0.5),  # one of two classes: all requests' shares
            (RequestSize(), 0.5),  # nothing known: all requests' shares
        ],
    )
    def test_shares_are_those_of_the_class(self, size: RequestSize, share_of_pair: float) -> None:
        router = ClassRouter(PATHS, 0.5, CLASSES)
        taken = Counter(router.choose(everywhere, {}, size) for _ in range(200))
        assert taken[PATHS[0]] == pytest.approx(200 * share_of_pair, abs=2)

    def test_a_class_without_a_path_that_is_up_takes_any(self) -> None:
        router = ClassRouter(PATHS, 0.5, CLASSES)
        chosen = router.choose(lambda path: path.target == "d", {}, RequestSize(1000, 5))
        assert chosen == PATHS[0]
        assert router.choose(lambda _: False, {}, RequestSize(1000, 5)) is None

    def test_paths_that_one_class_alone_takes_are_listed(self) -> None:
        only = Path(None, "e", 0.0, {"short": 1.0})
        assert ClassRouter([only], 0.5, [SHORT]).paths == (only,)
        assert ClassRouter([only], 0.5).paths == ()

    @given(st.lists(st.tuples(st.floats(0, 5000), st.one_of(st.none(), st.integers(1, 2000))), max_size=60))
    def test_without_classes_size_does_not_matter(self, sizes: list[tuple[float, int | None]]) -> None:
        one, other = ClassRouter(PATHS, 0.5), ClassRouter(PATHS, 0.5)
        for prompt, asked in sizes:
            assert one.choose(everywhere, {}, RequestSize(prompt, asked)) == other.choose(
                everywhere, {}, RequestSize()
            )


class TestPlan:
    @pytest.fixture
    def document(self) -> dict[str, Any]:
        """The small plan with two classes: long prompts are disaggregated, short ones are not."""
        document = copy.deepcopy(plan_document())
        document["classes"] = [
            {"name": "short", "prompt_to": 512, "fraction": 0.4},
            {"name": "long", "prompt_from": 512, "fraction": 0.6},
        ]
        document["class_routing"] = {"throughput_rps": 2.5, "gain": 0.25}
        document["routes"][0]["class_shares"] = {"short": 0.0, "long": 1.0}
        document["groups"][2]["class_shares"] = {"short": 1.0, "long": 0.0}
        return document

    def test_round_trip(self, document: dict[str, Any]) -> None:
        plan = parse_plan(document, "test")
        assert parse_plan(plan.document(), "test") == plan
        assert [one.name for one in plan.classes] == ["short", "long"]

    def test_without_classes_the_keys_are_absent(self) -> None:
        document = parse_plan(plan_document(), "test").document()
        assert not {"classes", "class_routing"} & document.keys()
        assert not any("class_shares" in part for part in (*document["groups"], *document["routes"]))

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda d: d["routes"][0]["class_shares"].update(long=0.5), "shares of class 'long' sum to 0.5"),
            (lambda d: d["routes"][0]["class_shares"].update(huge=0.5), "'huge', which is no request class"),
            (lambda d: d["classes"][0].update(fraction=0.5), "fractions of the request classes"),
            (lambda d: d["classes"][0].update(name="long"), "two request classes have one name"),
            (lambda d: d.pop("classes"), "which is no request class"),
        ],
    )
    def test_shares_that_do_not_add_up(self, document: dict[str, Any], change: Any, problem: str) -> None:
        change(document)
        with pytest.raises(InputError, match=problem):
            parse_plan(document, "test")
