"""An emulated engine's KV memory: blocks, given in the order of asking."""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf


class KvMemory:
    """Blocks of ``block_size`` tokens; without a limit by default.

    Nobody overtakes: who asks while another waits gets nothing, however little it is. Sequences that run may
    grow all the same.
    """

    def __init__(self, tokens: float = inf, block_size: int = 16) -> None:
        self.block_size = block_size
        self.total = tokens // block_size
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_size)

    def fits(self, blocks: int) -> bool:
        """Whether so many could ever be taken."""
        return blocks <= self.total

    def try_take(self, blocks: int) -> bool:
        """Take blocks if they are free and nobody waits for some."""
        return not self._waiting and self.grow(blocks)

    def grow(self, blocks: int) -> bool:
        """Take blocks if they are free."""
        if self.used + blocks > self.total:
            return False
        self.used += blocks
        return True

    async def take(self, blocks: int) -> None:
        """Take blocks as soon as they are free; cancelled, it has taken none."""
        if self.try_take(blocks):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (blocks, future)
        self._waiting.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(blocks)  # they were given in the very moment of the cancellation
            else:
                self._waiting.remove(entry)
                self._serve()
            raise

    def give(self, blocks: int) -> None:
        """Give blocks back."""
        self.used -= blocks
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self.grow(self._waiting[0][0]):
            _, future = self._waiting.popleft()
            future.set_result(None)
