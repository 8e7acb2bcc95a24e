"""A folder becomes the same archive wherever and whenever it is packed."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tidegate.cli.deploy import name_of
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.metadata_options import iso_time
from tidegate.cli.package import pack, packed


def fill(folder: Path, order: list[str]) -> Path:
    for name in order:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def archive(folder: Path) -> bytes:
    target = io.BytesIO()
    pack(folder, target)
    return target.getvalue()


def test_names_and_contents_are_all_that_counts(tmp_path: Path) -> None:
    names = ["config.pbtxt", "1/model.py", "1/deep/weights.bin"]
    first = fill(tmp_path / "a", names)
    second = fill(tmp_path / "b", names[::-1])
    os.utime(second / "config.pbtxt", (1, 1))
    (second / "1" / "__pycache__").mkdir()
    (second / "1" / "__pycache__" / "model.pyc").write_text("x")
    assert archive(first) == archive(second)
    with tarfile.open(fileobj=io.BytesIO(archive(first))) as tar:
        assert tar.getnames() == ["config.pbtxt", "1/model.py", "1/deep/weights.bin"]
        assert {(m.uid, m.gid, m.mtime, m.mode) for m in tar} == {(0, 0, 0, 0o644)}


def test_links_to_files_are_packed_as_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("w")
    folder = fill(tmp_path / "m", ["config.pbtxt"])
    (folder / "model.bin").symlink_to(tmp_path / "weights")
    with tarfile.open(fileobj=io.BytesIO(archive(folder))) as tar:
        member = tar.extractfile("model.bin")
        assert member is not None
        assert member.read() == b"w"


def test_links_to_folders_and_empty_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(UsageError, match="has no files"):
        archive(folder)
    (folder / "x").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="link to a folder"):
        archive(folder)


def test_a_package_knows_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"abc")
    with packed(path) as package:
        assert (package.filename, package.size) == ("m.onnx", 3)
        assert package.sha256.startswith("ba7816bf")
        assert b"".join(package.chunks()) == b"abc"
    with packed(fill(tmp_path / "My Model", ["a"])) as package:
        assert package.filename == "My Model.tar.gz"
    with pytest.raises(UsageError, match="No such file"), packed(tmp_path / "none"):
        pass


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("digits.onnx", "digits"),
        ("a/My_Model.v2.onnx", "My_Model.v2"),
        ("x.tar.gz", "x"),
        ("__a__.pt", "a__"),
        ("é" + "b" * 80 + ".onnx", "b" * 63),
    ],
)
def test_names_from_paths(path: str, name: str) -> None:
    assert name_of(Path(path)) == name


def test_no_name_from_a_path() -> None:
    with pytest.raises(UsageError, match="--name NAME"):
        name_of(Path("___.onnx"))


def test_times() -> None:
    assert iso_time("2024-05-31T10:00:00+00:00").startswith("2024-05-3")
    with pytest.raises(UsageError, match="--trained-at 'may'"):
        iso_time("may")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["model.py", "requirements.txt", "own/part.py"], "python"),
        (["config.pbtxt", "1/model.py"], "triton"),
        (["1/model.py"], "triton"),
        (["model.py", "config.pbtxt"], "triton"),
        (["model.py", "1/model.py"], "triton"),
        (["a/config.pbtxt", "a/1/model.py"], "triton"),
        (["saved_model.pb", "variables/variables.index"], "tensorflow"),
    ],
)
def test_what_a_folder_is(tmp_path: Path, files: list[str], kind: str) -> None:
    with packed(fill(tmp_path / "m", files)) as package:
        assert package.format == kind
