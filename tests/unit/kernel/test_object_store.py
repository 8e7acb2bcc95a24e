"""A store's URL is checked at the start: a missing package, or a protocol that cannot be a store."""

from __future__ import annotations

import sys

import pytest
from fsspec.registry import known_implementations

from tidegate.kernel.blobs import object_store

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "url", ["", "/srv/blobs", "file:///srv/blobs", "s3://bucket/a", "gs://bucket", "az://container/x"]
)
def test_what_works_as_installed(url: str):
    assert object_store.problem("TIDEGATE_BLOB_URL", url) is None


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("sftp://host/path", f"{sys.executable} -m pip install paramiko"),
        ("box://folder", "pip install boxfs"),
        ("nonsense://x", "an unknown protocol"),
        ("memory://x", "keeps its data in one process"),
        ("https://example.org/x", "cannot be written"),
        ("s3:///x", "names no bucket"),
    ],
)
def test_what_does_not(url: str, told: str):
    found = object_store.problem("TIDEGATE_BLOB_URL", url)
    assert found is not None
    assert told in found
    assert found.startswith("TIDEGATE_BLOB_URL ")


def test_every_protocol_that_fsspec_knows_is_judged():
    for protocol in known_implementations:
        object_store.problem("TIDEGATE_BLOB_URL", f"{protocol}://x")


def test_s3_without_its_driver_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    found = object_store.problem("TIDEGATE_ARTIFACT_URL", "s3://bucket/x")
    assert found is not None
    assert found.startswith("TIDEGATE_ARTIFACT_URL begins with s3://, and its driver is not installed")
    assert found.endswith("-m pip install obstore")
