"""Signatures of models: those of `model_signing`, our own, and wrong ones."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.unit.kernel.model_signing_files import FOLDER, KEY_ID, ONE_FILE, PUBLIC_KEY
from tidegate.kernel import signing
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.model_signature import difference, read_bundle
from tidegate.kernel.signing import BadKey, BadSignature, TrustedKeys

pytestmark = pytest.mark.unit

HI, CFG = b"hi\n", b"cfg\n"
FILES = {"1/model.onnx": HI, "config.pbtxt": CFG}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def private_key(path: Path, curve: ec.EllipticCurve | None = None) -> Path:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(pem)
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture
def keys(tmp_path: Path) -> TrustedKeys:
    return TrustedKeys.read(written(tmp_path / "known.pub", PUBLIC_KEY.encode()))


def test_signatures_of_the_tool_are_verified(tmp_path: Path, keys: TrustedKeys) -> None:
    file = written(tmp_path / "model.onnx", HI)
    assert keys.check([ONE_FILE], file, sha256(HI)) == KEY_ID
    packed = archive(tmp_path / "folder.tar.gz", FILES)
    assert keys.check([FOLDER], packed, "0" * 64) == KEY_ID
    inside = archive(tmp_path / "inside.tar.gz", {f"model/{name}": each for name, each in FILES.items()})
    assert keys.check([FOLDER], inside, "0" * 64) == KEY_ID


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (FILES | {"config.pbtxt": b"cfh\n"}, "'config.pbtxt' is not the signed one"),
        ({"config.pbtxt": CFG}, "'1/model.onnx' is missing"),
        (FILES | {"extra.py": b"import os"}, "'extra.py' is not signed"),
    ],
)
def test_other_files_than_the_signed_ones_are_refused(
    tmp_path: Path, keys: TrustedKeys, files: dict[str, bytes], problem: str
) -> None:
    with pytest.raises(BadSignature, match=problem):
        keys.check([FOLDER], archive(tmp_path / "folder.tar.gz", files), "0" * 64)


def test_a_changed_file_and_a_missing_signature_are_refused(tmp_path: Path, keys: TrustedKeys) -> None:
    file = written(tmp_path / "model.onnx", b"ho\n")
    with pytest.raises(BadSignature, match="is not the signed one, by the key 58abd4571fc7"):
        keys.check([ONE_FILE], file, sha256(b"ho\n"))
    with pytest.raises(BadSignature, match="no signature"):
        keys.check([], file, sha256(b"ho\n"))


def test_one_good_signature_of_several_is_enough(tmp_path: Path, keys: TrustedKeys) -> None:
    other = signing.sign("m", {".": sha256(HI)}, private_key(tmp_path / "other.pem"))
    file = written(tmp_path / "model.onnx", HI)
    with pytest.raises(BadSignature, match="the key is not trusted"):
        keys.check([other], file, sha256(HI))
    assert keys.check([other, ONE_FILE], file, sha256(HI)) == KEY_ID


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_our_own_signatures_are_verified(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = private_key(tmp_path / "own.pem", curve)
    bundle = signing.sign("m", {".": sha256(HI)}, key)
    trusted = TrustedKeys.read(tmp_path / "own.pub")
    assert trusted.ids == [read_bundle(bundle).key]
    assert trusted.check([bundle], written(tmp_path / "model.onnx", HI), sha256(HI)) == trusted.ids[0]


def test_a_changed_statement_is_not_trusted(keys: TrustedKeys) -> None:
    bundle = changed(lambda statement: statement["subject"][0].update(name="another"))
    assert keys.trusts(read_bundle(ONE_FILE))
    assert not keys.trusts(read_bundle(bundle))


def changed(change: Any) -> dict[str, Any]:
    bundle = copy.deepcopy(ONE_FILE)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return bundle


def set_at(*path: Any, value: Any) -> Any:
    def change(document: Any) -> None:
        for each in path[:-1]:
            document = document[each]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "bundle",
    [
        None, [], "text", {}, {"verificationMaterial": 1}, {"verificationMaterial": {"publicKey": {}}},
        ONE_FILE | {"verificationMaterial": {"x509CertificateChain": {}}},
        ONE_FILE | {"verificationMaterial": {"publicKey": {"hint": "short"}}},
        ONE_FILE | {"dsseEnvelope": ONE_FILE["dsseEnvelope"] | {"signatures": []}},
        ONE_FILE | {"dsseEnvelope": ONE_FILE["dsseEnvelope"] | {"payload": "%%%"}},
        ONE_FILE | {"dsseEnvelope": ONE_FILE["dsseEnvelope"] | {"payload": "bm90IGpzb24="}},
        ONE_FILE | {"dsseEnvelope": ONE_FILE["dsseEnvelope"] | {"payloadType": "text/plain"}},
        changed(set_at("predicateType", value="https://example.com/v1")),
        changed(set_at("predicate", "serialization", "method", value="shards")),
        changed(set_at("predicate", "serialization", "hash_type", value="blake3")),
        changed(set_at("predicate", "resources", value=[])),
        changed(set_at("predicate", "resources", 0, "digest", value="zz")),
        changed(set_at("predicate", "resources", 0, "name", value="../up")),
        changed(set_at("predicate", "resources", 0, "name", value="a//b")),
        changed(set_at("subject", 0, "digest", "sha256", value="0" * 64)),
    ],
)  # fmt: skip
def test_other_documents_are_refused(bundle: Any) -> None:
    with pytest.raises(BadRequest, match="The signature cannot be read") as found:
        read_bundle(bundle)
    assert found.value.reason == "bad_signature"


def test_keys_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadKey, match="No such file"):
        TrustedKeys.read(tmp_path / "missing.pem")
    with pytest.raises(BadKey, match="no public key"):
        TrustedKeys.read(tmp_path)
    with pytest.raises(BadKey, match="no public key"):
        TrustedKeys.read(written(tmp_path / "a.pem", b"text"))
    with pytest.raises(BadKey, match="not a public key"):
        TrustedKeys.read(private_key(tmp_path / "a.pem"))
    private_key(tmp_path / "b.pem", ec.SECP256K1())
    with pytest.raises(BadKey, match="secp256k1"):
        TrustedKeys.read(tmp_path / "b.pub")
    public = rsa.generate_private_key(65537, 2048).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(BadKey, match="not elliptic"):
        TrustedKeys.read(written(tmp_path / "c.pub", pem))
    with pytest.raises(BadKey, match="is not a private key"):
        signing.sign("m", {".": "0" * 64}, tmp_path / "c.pub")


def test_a_difference_names_the_first_file() -> None:
    assert difference({"a": "1"}, {"a": "1"}) == ""
    assert difference({"a": "1", "b": "2"}, {"m/a": "1", "m/b": "2"}) == ""
    assert difference({"m/a": "1"}, {"m/a": "1"}) == ""
    assert "'a' is not the signed one" in difference({"a": "1"}, {"m/a": "2"})
