"""TLS of the endpoint, and towards engines."""

from __future__ import annotations

import ssl
from pathlib import Path

from hexgen2.specs.errors import InputError


class Tls:
    """A server's certificate and key, TLS 1.2 or later. New connections get what was read last."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """InputError where the files are not a certificate (chain) and its key, both PEM."""
        self.files = (certificate, key)
        self.context = _context(certificate, key)

    @classmethod
    def from_options(cls, certificate: Path | None, key: Path | None) -> Tls | None:
        """From `--tls-cert` and `--tls-key`; InputError for one without the other."""
        if certificate is None and key is None:
            return None
        if certificate is None or key is None:
            missing = "--tls-cert" if certificate is None else "--tls-key"
            raise InputError(missing, "", "is missing", "give both --tls-cert and --tls-key, or neither")
        return cls(certificate, key)

    def reload(self) -> None:
        _context(*self.files)  # first on the side: a pair that does not fit must not end up half in use
        self.context.load_cert_chain(*self.files)


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise InputError(str(path), "", problem, f"give {option} a PEM file") from None
    try:
        # Asked for a passphrase, a server would wait for a terminal that it may not have.
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise InputError(
            str(certificate),
            "",
            f"is no certificate that goes with {key} ({reason})",
            "give --tls-cert a PEM certificate or chain, and --tls-key its key without a passphrase",
        ) from None
    return context


def trusting(authorities: Path | None) -> ssl.SSLContext | None:
    """What trusts the system's certificate authorities and those of a PEM file; None, which stands for the
    system's alone, where there is no file. InputError where it has no certificates."""
    if authorities is None:
        return None
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(authorities)
    except ssl.SSLError as error:
        raise InputError(
            str(authorities),
            "",
            f"has no certificates ({error.reason or error})",
            "give engine_ca_file a PEM file with the certificates of authorities",
        ) from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(str(authorities), "", problem, "give engine_ca_file a PEM file") from None
    return context


def _no_passphrase() -> str:
    raise ValueError("the key is encrypted")
