"""Addresses that users give."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_http(url: str) -> bool:
    """Whether it is an http:// or https:// address with a host, and a port that can be one.

    >>> is_http("http://[::1]:8000/v1"), is_http("http://"), is_http("http://a:99999"), is_http("a:80")
    (True, False, False, False)
    """
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port, or of brackets
        return False
