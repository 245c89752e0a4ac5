"""Which engines have computed which prompts' beginnings lately: what prefix caches may hold.

A prompt's text is cut into blocks, and each block is named by a hash of everything up to its end. The index
says which engines have seen a block; it knows nothing of what they have dropped since, so it only ever makes a
preference. Engines that went down hold nothing any more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hexgen2.coordinator.engine import Engine
from hexgen2.coordinator.request import encode
from hexgen2.specs.routing import Path

BLOCK_BYTES = 1024
"""Some 250 tokens: below that a cached prefix saves too little to bend a choice."""
MAX_BLOCKS = 64


def prefix_blocks(body: Mapping[str, Any]) -> tuple[int, ...]:
    """The names of a prompt's first whole blocks; empty for short prompts. Hashes are salted per process.

    >>> len(prefix_blocks({"prompt": "a" * 3000})), prefix_blocks({"prompt": "short"})
    (2, ())
    """
    blocks: list[int] = []
    # What changes the cache or stands before the messages makes another prompt of the same text.
    name = hash((body.get("model"), body.get("cache_salt"), str(body.get("tools"))))
    rest = b""
    for part in _parts(body):
        rest += part[: MAX_BLOCKS * BLOCK_BYTES]
        while len(rest) >= BLOCK_BYTES:
            name = hash((name, rest[:BLOCK_BYTES]))
            rest = rest[BLOCK_BYTES:]
            blocks.append(name)
            if len(blocks) == MAX_BLOCKS:
                return tuple(blocks)
    return tuple(blocks)


def _parts(body: Mapping[str, Any]) -> Iterator[bytes]:
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(messages, list):
        for message in messages:
            yield encode(message) + b"\n"
    elif isinstance(prompt, str):
        yield prompt[: MAX_BLOCKS * BLOCK_BYTES].encode("utf-8", "surrogatepass")
    elif isinstance(prompt, list):
        yield encode(prompt[: MAX_BLOCKS * BLOCK_BYTES])


class PrefixIndex:
    """Block -> the engines that have seen it, each in the life it was in; the least recently used go first."""

    def __init__(self, engines: Mapping[str, Engine], capacity: int = 32_768) -> None:
        self._engines = engines
        self._capacity = capacity
        self._seen: OrderedDict[int, dict[str, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, blocks: Iterable[int], path: Path) -> None:
        """A prompt with these blocks goes along this path."""
        for block in blocks:
            seen = self._seen.setdefault(block, {})
            self._seen.move_to_end(block)
            for group in path.groups:
                seen[group] = self._engines[group].lives
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)

    def preferred(self, blocks: Iterable[int], paths: Iterable[Path]) -> set[Path]:
        """The paths that can use most of the prompt's beginning; none where none can use any.

        A block at the engine that computes the prompt saves its computation, one at the engine that answers
        its transfer; a colocated engine saves both.
        """
        depth = self._depths(blocks)
        if not depth:
            return set()
        scores = {path: depth.get(path.prefill or path.target, 0) + depth.get(path.target, 0) for path in paths}
        best = max(scores.values(), default=0)
        return {path for path, score in scores.items() if score == best} if best else set()

    def _depths(self, blocks: Iterable[int]) -> dict[str, int]:
        """How many blocks from the beginning each engine has seen without a gap."""
        depths: dict[str, int] = {}
        for place, block in enumerate(blocks):
            going = False
            for group, life in self._seen.get(block, {}).items():
                engine = self._engines.get(group)
                if depths.get(group, 0) == place and engine is not None and engine.lives == life:
                    depths[group] = place + 1
                    going = True
            if not going:
                break
        return depths
