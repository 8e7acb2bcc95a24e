"""Read and make the bundles of OpenSSF Model Signing: signed lists of a model's files. Pure.

"Signature" means a cryptographic signature here, not the inputs and outputs of a model.

A bundle is a Sigstore bundle in JSON. It contains a DSSE envelope with an in-toto statement, which names each
file of the model with its sha256. `model_signing sign key` writes such bundles, and `model_signing verify
key` accepts those of :func:`bundle_of`. Signatures with certificates and keyless signatures are refused,
because a check of them needs an external service.

Specification: https://github.com/ossf/model-signing-spec
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tidegate.kernel.errors import BadRequest

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "https://model_signing/signature/v1.0"
# The path that a bundle states for the file of a model with only one file.
ONE_FILE = "."
# The most bytes of a bundle. A list of 10,000 files has about 2 MB, and Base64 makes it a third larger.
MAX_BUNDLE_BYTES = 8 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")

Files = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """A cryptographic signature of a model's files, as its bundle states it. It is not verified yet.

    ``key``: the sha256 of the public key's PEM text. ``message``: the bytes that were signed. ``files``: the
    sha256 of each file, by path. If the model has only one file, the path is ``"."``.
    """

    key: str
    message: bytes
    signature: bytes
    files: Files


def read_bundle(bundle: Any) -> ModelSignature:
    """Return the cryptographic signature in a bundle (parsed JSON). Raise BadRequest for anything else."""
    try:
        key = bundle["verificationMaterial"]["publicKey"]["hint"]
        envelope = bundle["dsseEnvelope"]
        statement, (signed,) = _decoded(envelope["payload"]), envelope["signatures"]
        type_, signature = envelope["payloadType"], _decoded(signed["sig"])
    except (KeyError, TypeError, ValueError, IndexError):
        raise _bad(
            "the file is not a Sigstore bundle with a signature by a key, as `model_signing sign key` "
            "writes it"
        ) from None
    if not isinstance(key, str) or _SHA256.fullmatch(key) is None:
        raise _bad("the bundle does not name its key: sign the model again with a newer model_signing")
    if type_ != PAYLOAD_TYPE:
        raise _bad(f"the bundle's payload is {str(type_)[:60]!r}, not {PAYLOAD_TYPE!r}")
    return ModelSignature(key, message_of(statement), signature, _files_of(statement))


def message_of(statement: bytes) -> bytes:
    """Return the bytes that are signed: the statement in DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(statement), statement)


def statement_of(name: str, files: Files) -> bytes:
    """Return the statement about a model's files. ``name`` is only for people."""
    digests = {path: files[path] for path in sorted(files)}
    return json.dumps(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": _root(digests)}}],
            "predicateType": PREDICATE,
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": [],
                },
                "resources": [
                    {"name": path, "algorithm": "sha256", "digest": digest}
                    for path, digest in digests.items()
                ],
            },
        }
    ).encode()


def bundle_of(statement: bytes, signature: bytes, key: str) -> dict[str, Any]:
    """Return the bundle of a signed statement."""
    return {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(statement).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }


def difference(signed: Files, found: Files) -> str:
    """Return the first difference between a model's files and the signed files; empty if they are the same.

    If all files of an archive are in one folder, the signed paths need not contain this folder.
    """
    if len({path.partition("/")[0] for path in found}) == 1 and signed.keys() != found.keys():
        found = {path.partition("/")[2] or path: digest for path, digest in found.items()}
    for path in sorted(signed.keys() | found.keys()):
        if path not in found:
            return f"the signed file {path!r} is missing"
        if path not in signed:
            return f"the file {path!r} is not signed"
        if signed[path] != found[path]:
            return f"the file {path!r} is not the signed one"
    return ""


def _files_of(raw: bytes) -> dict[str, str]:
    try:
        statement = json.loads(raw)
        kinds = statement["_type"], statement["predicateType"]
        ways = statement["predicate"]["serialization"]
        resources = statement["predicate"]["resources"]
        root = statement["subject"][0]["digest"]["sha256"]
        rows = [(each["name"], each["algorithm"], each["digest"]) for each in resources]
        method, hash_ = ways["method"], ways["hash_type"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise _bad("the bundle's payload is not a statement about a model's files") from None
    if kinds != (STATEMENT, PREDICATE):
        raise _bad(f"the bundle's payload is {str(kinds[1])[:60]!r}, not {PREDICATE!r}")
    if (method, hash_) != ("files", "sha256") or any(algorithm != "sha256" for _, algorithm, _ in rows):
        raise _bad(
            f"the signed files are hashed as {str(method)[:20]}, {str(hash_)[:20]}: sign whole files with "
            "sha256"
        )
    files: dict[str, str] = {}
    for name, _, digest in rows:
        if not isinstance(name, str) or not isinstance(digest, str) or _SHA256.fullmatch(digest) is None:
            raise _bad("the bundle names a file without a sha256")
        if name in files or name != str(PurePosixPath(name)) or name.startswith(("/", "../")):
            raise _bad(
                f"the bundle names the file {name[:80]!r} twice, or the file's path is not a relative path "
                "in normal form"
            )
        files[name] = digest
    if not files or root != _root(files):
        raise _bad("the bundle's list of files does not agree with the bundle's digest")
    return files


def _root(files: Files) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(each) for each in files.values())).hexdigest()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _bad(why: str) -> BadRequest:
    return BadRequest(f"The signature cannot be read: {why}.", reason="bad_signature")
