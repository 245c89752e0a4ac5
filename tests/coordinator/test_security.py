"""TLS, and keys and certificates that change while the coordinator runs."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme

from hexgen2.coordinator import ApiKeys, Coordinator, CoordinatorConfig, EngineEndpoint, Limits, Tls
from hexgen2.coordinator.client import EngineClient
from hexgen2.coordinator.desk import LocalDesk
from hexgen2.coordinator.errors import EngineFailure
from hexgen2.coordinator.reload import Reloader
from hexgen2.coordinator.tls import trusting
from hexgen2.specs.errors import InputError
from tests.waiting import HUNG_S

from .conftest import MODEL, QUICK, Stand, expected, running

Pair = tuple[Path, Path]


def write(folder: Path, authority: trustme.CA, name: str = "server") -> Pair:
    """A certificate for this host and its key."""
    issued = authority.issue_cert("127.0.0.1")
    paths = (folder / f"{name}.pem", folder / f"{name}.key")
    issued.cert_chain_pems[0].write_to_path(str(paths[0]))
    issued.private_key_pem.write_to_path(str(paths[1]))
    return paths


def knowing(authority: trustme.CA) -> ssl.SSLContext:
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
        assert await version(door.url, knowing(old)) == 200
        with pytest.raises(aiohttp.ClientError):
            await version(door.url.replace("https", "http"), knowing(old))
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await version(door.url, knowing(new))
        write(tmp_path, new)
        door.reload()
        assert await version(door.url, knowing(new)) == 200
        (tmp_path / "server.pem").write_text("nonsense")
        door.reload()
        assert await version(door.url, knowing(new)) == 200, "the former stays in use"


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


@pytest.mark.parametrize("workers", [1, 2])
async def test_engines_behind_a_private_authority(pair: Stand, tmp_path: Path, workers: int) -> None:
    """A coordinator behind HTTPS is the other one's engine."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = Tls(*write(tmp_path, authority))
    async with Coordinator(pair.coordinator.config, tls=tls).running() as behind:
        engine = EngineEndpoint(group_id="c0", role="colocated", url=behind.url, share=1.0)
        config = CoordinatorConfig(
            served_model_names=(MODEL,),
            engines=(engine,),
            timeouts=QUICK,
            limits=Limits(engine_wait_s=0),
            engine_ca_file=tmp_path / "ca.pem",
        )
        config = CoordinatorConfig.from_json(config.to_json())
        async with Coordinator(config, workers=workers).running() as front:
            stand = Stand(front, pair.engines, pair.http)
            answer = await stand.complete("a b c", max_tokens=7)
            assert answer["choices"][0]["text"] == expected("a b c", 7)
        stranger = config.model_copy(update={"engine_ca_file": None})
        async with Coordinator(stranger, workers=workers).running() as front:
            assert "Certificate" in front.fleet.engines["c0"].reason
            status, error, _ = await Stand(front, pair.engines, pair.http).post(
                "/v1/completions", {"model": MODEL, "prompt": "a"}
            )
            assert (status, error["error"]["code"]) == (503, "no_engine_available")


async def test_a_call_tells_of_a_certificate_that_nobody_vouches_for(pair: Stand, tmp_path: Path) -> None:
    tls = Tls(*write(tmp_path, trustme.CA()))
    async with Coordinator(pair.coordinator.config, tls=tls).running() as behind:
        fleet = pair.coordinator.fleet
        fleet.engines["d0"].endpoint = fleet.engines["d0"].endpoint.model_copy(update={"url": behind.url})
        client = EngineClient(LocalDesk(fleet, pair.coordinator.admission), QUICK)
        with pytest.raises(EngineFailure, match=r"no TLS connection \(CERTIFICATE_VERIFY_FAILED\)"):
            async with client.call("d0") as call:
                await call.open("/v1/completions", b"{}", {}, HUNG_S)


@pytest.mark.parametrize(
    ("text", "words"), [(None, "cannot be read"), ("", "has no cert"), ("x", "has no cert")]
)
def test_authorities_that_are_none_are_told_in_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "ca.pem").write_text(text)
    with pytest.raises(InputError, match=rf"ca\.pem: {words}"):
        trusting(tmp_path / "ca.pem")
