"""Real files are recognised from a bounded part of them."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from services.registry.adapters import glimpses
from services.registry.domain.recognition import HEAD_BYTES
from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveLimits


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def tar_gz(*names: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.zeros(3), y=np.ones(3))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


REAL: list[tuple[Callable[[], bytes], str]] = [
    (lambda: onnx_bytes(1), "an ONNX model"),
    (npz, "an archive of numpy arrays (.npz)"),
    (npy, "a numpy array"),
    (lambda: pickle.dumps([1]), "a pickle"),
    (lambda: zlib.compress(pickle.dumps(list(range(1000)))), "a pickle"),
    (lambda: gzip.compress(pickle.dumps([1])), "a pickle"),
    (lambda: gzip.compress(b"a,b\n1,2\n"), "compressed by gzip"),
    (lambda: tar_gz("model.py", "weights.npy"), "a folder with model.py"),
    (lambda: tar_gz("m/saved_model.pb", "m/variables/variables.index"), "a TensorFlow SavedModel"),
    (lambda: zipped("config.pbtxt", "1/model.py"), "an archive"),
    (lambda: zipped("net/data.pkl", "net/data/0"), "a PyTorch file of torch.save"),
    (lambda: zipped("a")[:-8], "a zip archive that is damaged"),
]


@pytest.mark.parametrize(("make", "what"), REAL)
def test_real_files(tmp_path: Path, make: Callable[[], bytes], what: str) -> None:
    path = tmp_path / "artifact"
    path.write_bytes(make())
    kind = glimpses.kind_of(path, "m", ArchiveLimits())
    assert kind is not None
    assert kind.what.startswith(what)


def test_little_is_read_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert len(glimpses.read(path, "m", ArchiveLimits()).head) == HEAD_BYTES


def test_an_archive_that_leads_out_of_its_folder_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.write_bytes(tar_gz("model.py", "../x"))
    with pytest.raises(BadRequest, match="below its root"):
        glimpses.kind_of(path, "m", ArchiveLimits())
