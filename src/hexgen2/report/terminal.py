"""Lines for a terminal."""

from __future__ import annotations

from rich.text import Text


def headed(head: str, rest: str = "") -> Text:
    """``head`` in bold and ``rest`` as it is; brackets in either are no markup.

    >>> headed("[/a]", " b").plain
    '[/a] b'
    """
    return Text.assemble((head, "bold"), rest)
