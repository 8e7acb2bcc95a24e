"""Signatures of this project and of the tool `model_signing`, each verified by the other.

`make test-signing` installs the tool and sets ``TIDEGATE_MODEL_SIGNING`` to its path.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.kernel.test_signing import FILES, archive, private_key
from tidegate.kernel import signing
from tidegate.kernel.signing import TrustedKeys

TOOL = os.environ.get("TIDEGATE_MODEL_SIGNING", "")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not TOOL, reason="needs the tool model_signing: make test-signing"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOL, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("what", ["", "1/model.onnx"], ids=["a folder", "a file"])
def test_the_tool_verifies_our_signature(folder: Path, tmp_path: Path, what: str) -> None:
    key, target, file = private_key(tmp_path / "k.pem"), folder / what, tmp_path / "own.sig"
    file.write_text(json.dumps(signing.sign(target.name, signing.digests_in(target), key)))
    verify = ("verify", "key", target, "--signature", file, "--public_key", key.with_suffix(".pub"))
    done = run(*verify)
    assert done.returncode == 0, done.stderr
    (folder / "1/model.onnx").write_bytes(b"other")
    assert run(*verify).returncode != 0


@pytest.mark.parametrize("what", ["", "1/model.onnx"], ids=["a folder", "a file"])
def test_we_verify_the_tools_signature(folder: Path, tmp_path: Path, what: str) -> None:
    key, target, file = private_key(tmp_path / "k.pem"), folder / what, tmp_path / "tool.sig"
    done = run("sign", "key", target, "--private_key", key, "--signature", file)
    assert done.returncode == 0, done.stderr
    trusted = TrustedKeys.read(key.with_suffix(".pub"))
    artifact = target if what else archive(tmp_path / "model.tar.gz", FILES)
    digest = signing.digests_in(artifact)["."]
    assert trusted.check([json.loads(file.read_text())], artifact, digest) == trusted.ids[0]
