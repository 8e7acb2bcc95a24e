"""What `tidegate load` takes over from the file of another stack."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tidegate.cli import version_archive
from tidegate.cli.exit_codes import UsageError

ARTIFACT = b"a pickle"
VERSION = {
    "model": "m",
    "number": 3,
    "filename": "m.joblib",
    "format": "sklearn",
    "artifact_sha256": hashlib.sha256(ARTIFACT).hexdigest(),
    "artifact_size": len(ARTIFACT),
    "trusted": ["posix.system"],
}
TEXTS = {
    version_archive.VERSION: orjson.dumps({"archive": 1, "version": VERSION}),
    version_archive.SIGNATURES: b"[]",
}


class Registry:
    """A registry that keeps what is registered."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []

    def post(self, path: str, body: Any, timeout_s: float) -> Any:
        self.bodies.append(body)
        return {"model": "m", "number": 1, "format": "sklearn"}


def archive(path: Path, texts: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, text in (*texts.items(), (version_archive.ARTIFACT, ARTIFACT)):
            tar.addfile(version_archive._entry(name, len(text)), io.BytesIO(text))
    return path


def loaded(file: Path, monkeypatch: pytest.MonkeyPatch, keys: Path | None = None, *trust: str) -> Any:
    monkeypatch.setattr(version_archive, "_upload", lambda *_: None)
    registry = Registry()
    plane, steps = cast(Any, SimpleNamespace(registry=registry)), SimpleNamespace(change=lambda *_: None)
    version_archive._load(plane, file, None, keys, True, list(trust), cast(Any, steps))
    return registry.bodies[-1].get("trust")


def test_a_file_that_nobody_signed_does_not_say_what_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = archive(tmp_path / "m.tar", TEXTS)
    assert loaded(file, monkeypatch) is None
    assert loaded(file, monkeypatch, None, "builtins.eval") == ["builtins.eval"]


def test_what_a_trusted_publisher_trusted_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = tmp_path / "signing.pem", tmp_path / "public.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    seal = orjson.dumps(version_archive._seal(VERSION, TEXTS, private))
    file = archive(tmp_path / "m.tar", TEXTS | {version_archive.SEAL: seal})
    assert loaded(file, monkeypatch, public) == ["posix.system"]
    changed = TEXTS | {version_archive.SIGNATURES: b"[ ]", version_archive.SEAL: seal}
    with pytest.raises(UsageError, match="was changed after it was signed"):
        loaded(archive(tmp_path / "n.tar", changed), monkeypatch, public)
