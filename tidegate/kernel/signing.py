"""Sign models, and check their cryptographic signatures.

Keys are elliptic (P-256, P-384 or P-521), in PEM files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tidegate.kernel import archives
from tidegate.kernel.protocol.archives import ArchiveChecker, ArchiveLimits, Unsafe
from tidegate.kernel.protocol.model_signature import (
    ONE_FILE,
    Files,
    ModelSignature,
    bundle_of,
    difference,
    message_of,
    read_bundle,
    statement_of,
)

CHUNK = 1024 * 1024
NEW_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out signing.pem"
_HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}
_BEGIN = b"-----BEGIN "


class BadKey(ValueError):
    """A file contains no usable key. The message names the file and the reason."""


class BadSignature(ValueError):
    """An artifact has no signature by a trusted key, or cannot be read. The message says why."""


class TrustedKeys:
    """A set of trusted public keys, by id. A signature is trusted if one of these keys made it."""

    def __init__(self, keys: Mapping[str, ec.EllipticCurvePublicKey]) -> None:
        self._keys = keys

    @classmethod
    def read(cls, path: Path) -> TrustedKeys:
        """Read the public keys in a PEM file, or in all files ``*.pem`` and ``*.pub`` of a folder.

        Raise BadKey if no key is found, or if a key cannot be used.
        """
        try:
            files = (
                sorted(each for each in path.iterdir() if each.suffix in (".pem", ".pub"))
                if path.is_dir()
                else [path]
            )
            found = {key_id(key): key for file in files for key in _public_keys(file)}
        except OSError as error:
            raise BadKey(f"{path}: {error.strerror}") from None
        if not found:
            raise BadKey(f"{path} has no public key: expected PEM files")
        return cls(found)

    @property
    def ids(self) -> list[str]:
        """Return the ids of the keys."""
        return list(self._keys)

    def trusts(self, signature: ModelSignature) -> bool:
        """Return True if one of the keys has made this signature."""
        key = self._keys.get(signature.key)
        if key is None:
            return False
        try:
            key.verify(signature.signature, signature.message, _algorithm(key))
        except InvalidSignature:
            return False
        return True

    def check(self, bundles: Iterable[Any], artifact: Path, sha256: str) -> str:
        """Return the id of the trusted key that signed an artifact. Raise BadSignature if there is none.

        ``bundles``: the artifact's signatures. ``sha256``: the artifact's digest. The calling code must
        compare the digest with the file before this call. This method blocks, because it reads all files of
        an archive.
        """
        problem = "the artifact has no signature"
        for bundle in bundles:
            signature = read_bundle(bundle)
            if not self.trusts(signature):
                problem = f"the signature by the key {signature.key[:12]} is wrong, or the key is not trusted"
            elif problem := mismatch(signature.files, artifact, sha256):
                problem = f"{problem}, by the key {signature.key[:12]}"
            else:
                return signature.key
        raise BadSignature(problem)


def mismatch(signed: Files, artifact: Path, sha256: str) -> str:
    """Return a text about how an artifact differs from the signed files; empty if it does not.

    This function blocks, because it reads all files of an archive.
    """
    if signed == {ONE_FILE: sha256}:
        return ""
    if not archives.is_archive(artifact):
        return difference(signed, {ONE_FILE: sha256})
    if signed.keys() == {ONE_FILE}:
        return "the signature is for one file, but the model is another file or an archive of several files"
    return difference(signed, digests_of(artifact))


def digests_of(archive: Path) -> dict[str, str]:
    """Return the sha256 of each file in an archive, by path. Raise BadSignature for a bad archive."""
    checker = ArchiveChecker(ArchiveLimits(), archive.stat().st_size)
    found = {}
    try:
        with archives.reading():
            for member, content in archives.members(archive):
                inner = checker.admit(member)
                if inner is not None:
                    with content() as stream:
                        found[str(inner)] = _digest(stream)
    except (archives.BrokenArchive, Unsafe) as error:
        raise BadSignature(f"the archive of the model cannot be read: {error}") from None
    return found


def digests_in(path: Path) -> dict[str, str]:
    """Return the path and the sha256 of each file below a folder. A single file has the path ``"."``."""
    if path.is_file():
        with path.open("rb") as file:
            return {ONE_FILE: _digest(file)}
    found = {}
    for each in sorted(path.rglob("*")):
        if each.is_file():
            with each.open("rb") as file:
                found[each.relative_to(path).as_posix()] = _digest(file)
    return found


def sign(name: str, files: Files, private_key: Path, password: str | None = None) -> dict[str, Any]:
    """Sign a model's files, and return the bundle with the signature.

    Raise BadKey if the private key cannot be read or used.
    """
    try:
        key = serialization.load_pem_private_key(
            private_key.read_bytes(), None if password is None else password.encode()
        )
    except OSError as error:
        raise BadKey(f"{private_key}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadKey(
            f"{private_key} is not a private key in PEM, or its password is wrong: {error}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadKey(f"{private_key} is not an elliptic key. Make one: {NEW_KEY}")
    public = _usable(key.public_key(), private_key)
    statement = statement_of(name, files)
    signature = key.sign(message_of(statement), _algorithm(public))
    return bundle_of(statement, signature, key_id(public))


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Return the id of a public key, which is the sha256 of its PEM text. Bundles contain this id."""
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _public_keys(file: Path) -> list[ec.EllipticCurvePublicKey]:
    blocks = [_BEGIN + block for block in file.read_bytes().split(_BEGIN)[1:]]
    if not blocks:
        raise BadKey(f"{file} has no public key: expected PEM")
    found = []
    for block in blocks:
        try:
            key = serialization.load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BadKey(f"{file} has a block that is not a public key in PEM: {error}") from None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise BadKey(f"{file} has a key that is not elliptic (P-256, P-384 or P-521)")
        found.append(_usable(key, file))
    return found


def _usable(key: ec.EllipticCurvePublicKey, file: Path) -> ec.EllipticCurvePublicKey:
    if key.curve.name not in _HASHES:
        raise BadKey(f"{file} has a key on the curve {key.curve.name}: use P-256, P-384 or P-521")
    return key


def _algorithm(key: ec.EllipticCurvePublicKey) -> ec.ECDSA:
    return ec.ECDSA(_HASHES[key.curve.name]())


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
