"""API keys from a file."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from hexgen2.specs.errors import InputError


class ApiKeys:
    """Knows the digests of the keys, not the keys. An empty set lets nobody in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self.files: tuple[Path, ...] = ()

    def reload(self) -> None:
        """Read the file again; InputError where it is wrong, and then the former keys stay."""
        for path in self.files:
            self._digests = ApiKeys.from_file(path)._digests

    @property
    def digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each key."""
        return self._digests

    @classmethod
    def of_digests(cls, digests: Iterable[bytes], files: tuple[Path, ...]) -> ApiKeys:
        """The same keys in another process."""
        keys = cls(())
        keys._digests, keys.files = tuple(digests), files
        return keys

    @classmethod
    def from_file(cls, path: Path | str) -> ApiKeys:
        """One key a line; empty lines and lines that begin with # are skipped. InputError where none is
        left.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(
                str(path), "", f"cannot be read ({reason})", "give a file with one key a line"
            ) from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise InputError(str(path), "", "holds no API key", "write one key a line")
        read = cls(keys)
        read.files = (Path(path),)
        return read

    def who(self, authorization: str | None) -> str | None:
        """Which key an `Authorization` header carries, as a name that does not give it away; None for none
        of them.

        The time taken does not tell which key, or how nearly one was met.
        """
        if authorization is None:
            return None
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return digest.hex()[:12] if found and scheme.lower() == "bearer" else None
