"""KV blocks of an engine whose sequences all grow by one token a step, counted without visiting them."""

from __future__ import annotations


class Blocks:
    """Blocks in use by decoding sequences and by reservations.

    A sequence with c cached tokens holds ⌈c/size⌉ blocks and takes one more each time that its tokens fill
    them, once every ``size`` steps. So it is enough to know how many sequences take one at each step modulo
    ``size``.
    """

    def __init__(self, total: int, size: int) -> None:
        self.total = total
        self.size = size
        self.used = 0
        self.peak = 0
        self.step = 0
        self.sequences = 0
        self._takers = [0] * size

    def needed(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.size)

    def next_step(self) -> int:
        """Blocks that the next step takes."""
        return self._takers[(self.step + 1) % self.size]

    def reserve(self, blocks: int, spare: int = 0) -> bool:
        """Take blocks for a sequence that does not decode yet, if ``spare`` are left then; else nothing."""
        if self.used + blocks + spare > self.total:
            return False
        self.used += blocks
        self.peak = max(self.peak, self.used)
        return True

    def release(self, blocks: int) -> None:
        """Give back reserved blocks."""
        self.used -= blocks

    def join(self, context: int) -> None:
        """A sequence whose blocks are reserved begins to decode with ``context`` cached tokens."""
        self._takers[(self.step + 1 - context) % self.size] += 1
        self.sequences += 1

    def leave(self, context: int, step: int) -> None:
        """A sequence that began with ``context`` tokens at ``step`` ends now and gives back its blocks."""
        self._takers[(step + 1 - context) % self.size] -= 1
        self.sequences -= 1
        self.used -= self.needed(context + self.step - step)

    def advance(self, steps: int) -> None:
        """All decoding sequences grow by ``steps`` tokens."""
        rounds, rest = divmod(steps, self.size)
        self.used += rounds * self.sequences
        for step in range(self.step + 1, self.step + rest + 1):
            self.used += self._takers[step % self.size]
        self.step += steps
        self.peak = max(self.peak, self.used)

    def steps_left(self, most: int) -> int:
        """How many steps, ``most`` at the most, fit into the free blocks."""
        free = self.total - self.used
        if self.sequences == 0:
            return most
        rounds, free = divmod(free, self.sequences)
        steps = rounds * self.size
        # One round takes a block for each sequence, so the rest ends within the next round.
        for step in range(self.step + 1, self.step + self.size + 1):
            free -= self._takers[step % self.size]
            if free < 0 or steps >= most:
                break
            steps += 1
        return min(steps, most)
