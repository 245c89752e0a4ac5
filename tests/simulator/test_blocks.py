"""Block counting against a count sequence by sequence."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from hexgen2.simulator.blocks import Blocks


@given(
    size=st.integers(1, 16),
    total=st.integers(50, 400),
    actions=st.lists(st.tuples(st.sampled_from(["join", "advance", "leave"]), st.integers(1, 60)), max_size=40),
)
def test_counts_like_a_count_of_each_sequence(size: int, total: int, actions: list[tuple[str, int]]) -> None:
    blocks = Blocks(total, size)
    tokens: list[list[int]] = []  # [tokens now, tokens at the start, step at the start]
    for action, number in actions:
        if action == "join" and blocks.reserve(ceil(number / size)):
            blocks.join(number)
            tokens.append([number, number, blocks.step])
        elif action == "leave" and tokens:
            _, start, step = tokens.pop(number % len(tokens))
            blocks.leave(start, step)
        elif action == "advance":
            steps = blocks.steps_left(number)
            held = sum(ceil((now + steps) / size) for now, *_ in tokens)
            assert held <= total
            if steps < number:
                assert sum(ceil((now + steps + 1) / size) for now, *_ in tokens) > total
            assert blocks.next_step() == sum(ceil((now + 1) / size) - ceil(now / size) for now, *_ in tokens)
            blocks.advance(steps)
            for entry in tokens:
                entry[0] += steps
        assert blocks.used == sum(ceil(now / size) for now, *_ in tokens)
        assert blocks.peak >= blocks.used


def test_reserve_leaves_the_spare() -> None:
    blocks = Blocks(10, 16)
    assert not blocks.reserve(8, spare=3)
    assert blocks.reserve(8, spare=2)
    assert not blocks.reserve(3)
    blocks.release(8)
    assert blocks.reserve(10)
