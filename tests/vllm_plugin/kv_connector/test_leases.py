"""The lease book: blocks are given back once, never while they are read; ended leases never come back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hexgen2.vllm_plugin.kv_connector.leases import LeaseBook, LeaseState


def test_a_lease_that_is_over_ends_as_expired() -> None:
    book = LeaseBook()
    book.order(1, "a", duration_s=10, now=0)
    assert book.collect(now=9.9) == []
    assert [(ended.request, ended.expired) for ended in book.collect(now=10)] == [("a", True)]
    assert book.state(1) is LeaseState.ENDED


def test_a_release_before_the_order_counts() -> None:
    book = LeaseBook()
    assert book.release(1) is LeaseState.UNKNOWN
    book.order(1, "a", duration_s=10, now=0)
    assert [(ended.request, ended.expired) for ended in book.collect(now=0)] == [("a", False)]


def test_a_reader_that_is_too_late_is_told_so() -> None:
    book = LeaseBook()
    book.order(1, "a", duration_s=10, now=0)
    book.collect(now=11)
    assert book.announce(1, "late", hold_s=60, now=11) is LeaseState.ENDED
    assert book.finish(1, "late") is LeaseState.ENDED


def test_a_reader_faster_than_the_order_is_told_to_wait() -> None:
    assert LeaseBook().announce(1, "fast", hold_s=60, now=0) is LeaseState.UNKNOWN


def test_a_release_waits_for_the_readers() -> None:
    book = LeaseBook()
    book.order(1, "a", duration_s=10, now=0)
    book.announce(1, "reader", hold_s=60, now=0)
    book.release(1)
    assert book.collect(now=1) == []
    assert book.finish(1, "reader") is LeaseState.HELD
    assert len(book.collect(now=1)) == 1


def test_a_reader_that_never_finishes_holds_no_longer_than_it_said() -> None:
    book = LeaseBook()
    book.order(1, "a", duration_s=10, now=0)
    book.announce(1, "stuck", hold_s=60, now=5)
    assert book.collect(now=64) == []
    assert len(book.collect(now=65)) == 1
    assert book.finish(1, "stuck") is LeaseState.ENDED


def test_a_renewal_moves_the_end() -> None:
    book = LeaseBook()
    book.order(1, "a", duration_s=10, now=0)
    assert book.renew(1, duration_s=10, now=8) is LeaseState.HELD
    assert book.collect(now=17) == []
    assert len(book.collect(now=18)) == 1
    assert book.renew(1, duration_s=10, now=18) is LeaseState.ENDED


def test_numbers_must_rise() -> None:
    book = LeaseBook()
    book.order(2, "a", duration_s=10, now=0)
    with pytest.raises(ValueError, match="comes after"):
        book.order(2, "b", duration_s=10, now=0)


@dataclass
class Read:
    """A reader between its announcement and its end; `safe` until its blocks are given back."""

    lease: int
    name: str
    safe: bool = True


@dataclass
class Model:
    now: float = 0.0
    ordered: int = 0
    given_back: list[str] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


class LeaseMachine(RuleBasedStateMachine):
    """Any order of events: a reader that is told HELD at its end never read blocks that had been given back."""

    @initialize()
    def start(self) -> None:
        self.book, self.model = LeaseBook(), Model()

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.model.now += seconds

    @rule(duration=st.floats(1, 20))
    def order(self, duration: float) -> None:
        self.model.ordered += 1
        number = self.model.ordered
        self.book.order(number, f"request-{number}", duration_s=duration, now=self.model.now)

    @rule(lease=st.integers(1, 8), hold=st.floats(0, 40))
    def announce(self, lease: int, hold: float) -> None:
        name = f"reader-{len(self.model.reads)}-{self.model.now}"
        if self.book.announce(lease, name, hold_s=hold, now=self.model.now) is LeaseState.HELD:
            assert f"request-{lease}" not in self.model.given_back
            self.model.reads.append(Read(lease, name))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.model.reads:
            read = self.model.reads.pop(data.draw(st.integers(0, len(self.model.reads) - 1)))
            assert (self.book.finish(read.lease, read.name) is LeaseState.HELD) == read.safe

    @rule(lease=st.integers(1, 8))
    def release(self, lease: int) -> None:
        self.book.release(lease)

    @rule()
    def collect(self) -> None:
        for ended in self.book.collect(self.model.now):
            assert ended.request not in self.model.given_back, "given back twice"
            self.model.given_back.append(ended.request)
            for read in self.model.reads:
                read.safe = read.safe and read.lease != ended.lease

    @invariant()
    def nothing_is_lost(self) -> None:
        assert len(self.book) + len(self.model.given_back) == self.model.ordered


LeaseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLeaseMachine = LeaseMachine.TestCase
