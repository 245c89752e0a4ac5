"""TLS, and keys and certificates that change while the coordinator runs."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme

from hexgen2.coordinator import ApiKeys, Coordinator, Tls
from hexgen2.coordinator.reload import Reloader
from hexgen2.specs.errors import InputError

from .conftest import Stand, running

Pair = tuple[Path, Path]


def write(folder: Path, authority: trustme.CA, name: str = "server") -> Pair:
    """A certificate for this host and its key."""
    issued = authority.issue_cert("127.0.0.1")
    paths = (folder / f"{name}.pem", folder / f"{name}.key")
    issued.cert_chain_pems[0].write_to_path(str(paths[0]))
    issued.private_key_pem.write_to_path(str(paths[1]))
    return paths


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def version(url: str, context: ssl.SSLContext) -> int:
    async with aiohttp.ClientSession() as http, http.get(url + "/version", ssl=context) as response:
        return response.status


async def test_https_and_a_certificate_that_is_replaced(pair: Stand, tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    tls = Tls(*write(tmp_path, old))
    async with Coordinator(pair.coordinator.config, tls=tls).running() as door:
        assert door.url.startswith("https://127.0.0.1:")
        assert await version(door.url, trusting(old)) == 200
        with pytest.raises(aiohttp.ClientError):
            await version(door.url.replace("https", "http"), trusting(old))
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await version(door.url, trusting(new))
        write(tmp_path, new)
        door.reload()
        assert await version(door.url, trusting(new)) == 200
        (tmp_path / "server.pem").write_text("nonsense")
        door.reload()
        assert await version(door.url, trusting(new)) == 200, "the former stays in use"


def test_nothing_older_than_tls_1_2(tmp_path: Path) -> None:
    assert Tls(*write(tmp_path, trustme.CA())).context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate, key = write(tmp_path, authority)
    _, other = write(tmp_path, authority, "other")
    assert Tls.from_options(None, None) is None
    with pytest.raises(InputError, match="--tls-key: is missing"):
        Tls.from_options(certificate, None)
    with pytest.raises(InputError, match=r"gone\.pem: cannot be read"):
        Tls(tmp_path / "gone.pem", key)
    with pytest.raises(InputError, match="is no certificate that goes with"):
        Tls(certificate, other)
    with pytest.raises(InputError, match="is no certificate that goes with"):
        Tls(key, key)


def test_an_encrypted_key_is_refused_and_not_asked_for(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as pem

    certificate, key = write(tmp_path, trustme.CA())
    plain = pem.load_pem_private_key(key.read_bytes(), None)
    secret = pem.BestAvailableEncryption(b"secret")
    key.write_bytes(plain.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, secret))
    with pytest.raises(InputError, match="is no certificate that goes with"):
        Tls(certificate, key)


async def test_keys_are_taken_over_when_their_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    body = {"prompt": "a", "max_tokens": 1}
    async with running({"c0": 1.0}, keys=ApiKeys.from_file(file)) as stand:

        async def allowed(key: str) -> bool:
            status, _, _ = await stand.post("/v1/completions", body, Authorization=f"Bearer {key}")
            return status == 200

        assert (await allowed("one"), await allowed("two")) == (True, False)
        file.write_text("# rotated\ntwo\n")
        stand.coordinator.reload()
        assert (await allowed("one"), await allowed("two")) == (False, True)
        file.write_text("# nothing left\n")
        stand.coordinator.reload()
        assert await allowed("two"), "a file without keys is a mistake: the former stay"


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    keys = ApiKeys.from_file(file)
    reloader, reload, reads = Reloader([keys, ApiKeys(["fixed"])]), keys.reload, [0]

    def counted() -> None:
        reads[0] += 1
        reload()

    monkeypatch.setattr(keys, "reload", counted)
    reloader.look()
    assert reads == [0]
    file.write_text("two\n")
    os.utime(file, ns=(1, 1))
    reloader.look()
    reloader.look()
    assert reads == [1]
    assert keys.who("Bearer two") is not None
    file.unlink()
    reloader.look()
    assert keys.who("Bearer two") is not None


def test_a_file_that_vanishes_while_it_is_read_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    keys = ApiKeys.from_file(file)

    def vanishes() -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(keys, "reload", vanishes)
    Reloader([keys]).look(force=True)
    assert keys.who("Bearer one") is not None
