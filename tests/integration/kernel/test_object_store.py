"""Stores that are not a folder: a real S3 server, and a service with a URL without a driver."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import PATIENCE_S
from tests.integration.kernel.s3 import S3
from tidegate import stack
from tidegate.kernel.blobs import object_store
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.settings.base import Settings

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("service", "setting"), [("registry", "ARTIFACT"), ("gateway", "BLOB"), ("router", "BLOB")]
)
def test_a_service_names_the_missing_package_when_it_starts(tmp_path, service: str, setting: str):
    environment = {
        "TIDEGATE_STATE_DIR": str(tmp_path),
        "TIDEGATE_SERVICE_TOKEN": "t",
        f"TIDEGATE_{setting}_URL": "sftp://host/path",
        "PATH": "",
    }
    command = [sys.executable, "-P", "-m", f"services.{service}"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"tidegate {service}: TIDEGATE_{setting}_URL begins with sftp://")
    assert "Traceback" not in done.stderr


def test_the_stack_does_not_start_with_it(tmp_path):
    settings = Settings(state_dir=tmp_path, blob_url="sftp://host/path")
    with pytest.raises(stack.MissingPart, match=r"TIDEGATE_BLOB_URL begins with sftp://.* paramiko"):
        stack.up(settings)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_read_in_pieces_by_one_request(s3: S3):
    store = object_store.opened(s3.url)
    content = os.urandom(3 * object_store.PIECE + 17)
    store.files.pipe_file(f"{store.root}/a/b", content)
    stream = store.stream(f"{store.root}/a/b")
    pieces = list(stream.pieces)
    stream.close()
    assert b"".join(pieces) == content
    assert len(pieces) > 1
    rest = store.stream(f"{store.root}/a/b", object_store.PIECE + 5)
    assert b"".join(rest.pieces) == content[object_store.PIECE + 5 :]
    with pytest.raises(FileNotFoundError):
        store.stream(f"{store.root}/a/c")


async def test_wrong_credentials_are_told(s3_at: Callable[[str], S3], monkeypatch: pytest.MonkeyPatch):
    s3 = s3_at("rclone")  # moto accepts every credential
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.forget_clients()
    blobs = Blobs(s3.url)
    with pytest.raises(Unavailable, match="the blob store cannot be written"):
        await blobs.put(b"x", 10.0)
    blobs.close()
    s3.forget_clients()
