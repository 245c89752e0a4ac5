"""Stop strings across the point where one engine's text ends and another's begins. Pure.

An engine holds back the text that may be the start of a stop string. When it is lost, the text it held back
is lost with it, although its tokens are known; and the engine that goes on looks for stop strings in its
own text only. The seam gives out the held-back text and finds the stop strings that lie across.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopSeam:
    """`text` is everything generated before the seam, of which the first `sent` characters reached the client.

    >>> seam = StopSeam("one two EN", 8, ["END"], keep_stop=False)
    >>> seam.add("D three", last=False)
    ('', 'END')
    """

    def __init__(self, text: str, sent: int, stops: Sequence[str], keep_stop: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._keep_stop = keep_stop
        self._reach = max(map(len, self._stops), default=1) - 1
        begin = min(len(text) - self._reach, sent) if self._reach else sent
        begin = max(0, begin)
        self._buffer = text[begin:]
        self._sent = sent - begin
        self._old = len(self._buffer)
        self.closed = False  # nothing lies across any more: text may pass as it comes

    def add(self, text: str, last: bool) -> tuple[str, str | None]:
        """Take the other engine's next text: what to send now, and the stop string that ends the generation.

        With `last` nothing more comes and nothing is held back.
        """
        if self.closed:
            return text, None
        self._buffer += text
        found = self._across()
        if found is not None:
            stop, at = found
            self.closed = True
            return self._send(at + len(stop) if self._keep_stop else at), stop
        if last or len(self._buffer) - self._old >= self._reach:
            self.closed = True
            return self._send(len(self._buffer)), None
        if self._keep_stop:
            return self._send(len(self._buffer)), None
        return "", None

    def _across(self) -> tuple[str, int] | None:
        """The stop string that begins before the seam, ends after it, and ends first."""
        best: tuple[str, int] | None = None
        for stop in self._stops:
            at = self._buffer.find(stop, max(0, self._old - len(stop) + 1))
            if 0 <= at < self._old and (best is None or at + len(stop) < best[1] + len(best[0])):
                best = (stop, at)
        return best

    def _send(self, end: int) -> str:
        begin, self._sent = self._sent, max(self._sent, end)
        return self._buffer[begin:end]
