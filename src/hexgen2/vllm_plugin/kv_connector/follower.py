"""Following one worker of the prefill engine: read what it has computed, while it computes the rest.

Reads never overlap within one follower: while one is under way the prefill goes on, and the next takes all that
has come in between. So a slow link gets few large reads, and a fast one is at most a layer behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hexgen2.vllm_plugin.kv_connector.wire import Advance


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of the parts with these numbers."""

    parts: tuple[int, ...]
    start: int
    stop: int


@dataclass
class Follower:
    """What has been read of a stream. One entry of `layers` and `grids` for each part that is to be read: the
    number of its layer in the sender's table, and the tokens that can only be read together (with unlike block
    sizes their greatest common divisor, else a block).

    >>> follower = Follower(start=0, stop=300, layers=(0, 1), grids=(128, 128))
    >>> follower.spans(Advance("held", "", 96, 1, 192, ()))  # the first layer has a whole block
    [Span(parts=(0,), start=0, stop=128)]
    >>> follower.spans(Advance("held", "", 300, 0, 0, ()))
    [Span(parts=(0,), start=128, stop=300), Span(parts=(1,), start=0, stop=300)]
    >>> follower.complete
    True
    """

    start: int
    stop: int
    layers: Sequence[int]
    grids: Sequence[int]
    blocks: list[int] = field(default_factory=list)
    _read: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._read = [self.start] * len(self.layers)

    @property
    def complete(self) -> bool:
        return all(read >= self.stop for read in self._read)

    def spans(self, news: Advance) -> list[Span]:
        """What can be read now and has not been; it counts as read from here on."""
        self.blocks.extend(news.blocks)
        spans: dict[tuple[int, int], list[int]] = {}
        for part, (layer, grid) in enumerate(zip(self.layers, self.grids, strict=True)):
            there = max(news.done, news.ahead) if layer < news.layers else news.done
            start, stop = self._read[part], self.stop
            if there < stop:
                stop = there // grid * grid  # the rest of a block comes when it is full, so no byte comes twice
            if stop > start:
                spans.setdefault((start, stop), []).append(part)
                self._read[part] = stop
        return [Span(tuple(parts), *bounds) for bounds, parts in spans.items()]
