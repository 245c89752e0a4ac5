"""How long the blocks of a finished prefill stay where they are.

The scheduler of the prefill engine hands out a lease with each answer; every worker of it keeps a book. Blocks
are given back to vLLM only after a lease has *ended* (released or expired) here, and the number of an ended
lease is never used again. So a reader that finds its lease still held AFTER its read knows that the blocks were
not touched in between; one that does not must throw away what it read. A reader announces itself before it
reads, which also holds the lease open for as long as the read may take.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

LONGEST_HOLD_S = 600.0
"""A reader cannot hold a lease open for longer than this with one announcement."""


class LeaseState(StrEnum):
    """What the book knows of a lease number."""

    HELD = "held"
    ENDED = "ended"
    UNKNOWN = "not known yet"
    """Higher than any number seen: the reader was faster than the scheduler's order."""


@dataclass(frozen=True)
class LeaseOrder:
    """The scheduler's order to every worker: keep this finished request's blocks for whoever fetches them.
    `stream` is the key under which they may have been read before; empty without one.
    """

    lease: int
    request: str
    duration_s: float
    stream: str = ""


@dataclass
class _Lease:
    request: str
    expires: float
    released: bool = False
    holds: dict[str, float] = field(default_factory=dict)


class LeaseBook:
    """The leases of one worker. Times are seconds of a monotonic clock that the caller passes in.

    Lease numbers are those of the scheduler's counter and rise from order to order.

    >>> book = LeaseBook()
    >>> book.order(1, "request-a", duration_s=30, now=0)
    >>> book.announce(1, "reader", hold_s=60, now=10)
    <LeaseState.HELD: 'held'>
    >>> book.collect(now=50)  # the lease is over, but a reader holds it
    []
    >>> book.finish(1, "reader")
    <LeaseState.HELD: 'held'>
    >>> [ended.request for ended in book.collect(now=50)]
    ['request-a']
    >>> book.finish(1, "reader")
    <LeaseState.ENDED: 'ended'>
    """

    def __init__(self) -> None:
        self._leases: dict[int, _Lease] = {}
        self._highest = 0
        self._early_releases: set[int] = set()

    def order(self, lease: int, request: str, *, duration_s: float, now: float) -> None:
        """Take up a lease that the scheduler has handed out."""
        if lease <= self._highest:
            raise ValueError(f"lease {lease} comes after lease {self._highest}")
        self._highest = lease
        self._leases[lease] = _Lease(request, now + duration_s)
        if lease in self._early_releases:
            self._early_releases.discard(lease)
            self._leases[lease].released = True

    def state(self, lease: int) -> LeaseState:
        if lease in self._leases:
            return LeaseState.HELD
        return LeaseState.UNKNOWN if lease > self._highest else LeaseState.ENDED

    def announce(self, lease: int, reader: str, *, hold_s: float, now: float) -> LeaseState:
        """A reader is about to read; a held lease stays so for `hold_s` seconds or until `finish`."""
        if entry := self._leases.get(lease):
            entry.holds[reader] = now + min(hold_s, LONGEST_HOLD_S)
        return self.state(lease)

    def finish(self, lease: int, reader: str) -> LeaseState:
        """The reader has read (or given up). HELD means that what it read is right."""
        if entry := self._leases.get(lease):
            entry.holds.pop(reader, None)
        return self.state(lease)

    def renew(self, lease: int, *, duration_s: float, now: float) -> LeaseState:
        """The request still waits for its turn on the decode side."""
        if entry := self._leases.get(lease):
            entry.expires = max(entry.expires, now + duration_s)
        return self.state(lease)

    def release(self, lease: int) -> LeaseState:
        """Nobody will read any more. May come before the order; that is remembered."""
        state = self.state(lease)
        if state is LeaseState.HELD:
            self._leases[lease].released = True
        elif state is LeaseState.UNKNOWN and len(self._early_releases) < 10_000:
            self._early_releases.add(lease)
        return state

    def collect(self, now: float) -> list[EndedLease]:
        """End and forget every lease that is released or over and that no reader holds."""
        ended = []
        for number, lease in list(self._leases.items()):
            if (lease.released or now >= lease.expires) and not any(
                until > now for until in lease.holds.values()
            ):
                del self._leases[number]
                ended.append(EndedLease(number, lease.request, expired=not lease.released))
        return ended

    def __len__(self) -> int:
        return len(self._leases)


@dataclass(frozen=True)
class EndedLease:
    """A lease whose blocks may be given back; `expired` if nobody released it."""

    lease: int
    request: str
    expired: bool
