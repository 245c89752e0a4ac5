"""The limit of open files of a process that serves."""

from __future__ import annotations

import resource

import pytest

from hexgen2.coordinator.descriptors import WANTED, raise_limit

ANY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, 2**20), (WANTED, 2**20)),
        ((1024, ANY), (WANTED, ANY)),
        ((2**18, 2**20), None),
        ((ANY, ANY), None),
        ((WANTED, WANTED), None),
    ],
)
def test_the_soft_limit_is_raised(
    before: tuple[int, int], after: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: before)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    raise_limit()
    assert given == ([] if after is None else [after])


def test_a_system_that_refuses_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, ANY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_limit()
