"""The format of a backup: it is read as it was written, and any damage is found."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tidegate.stack.backup_file import BackupError, Manifest, extract, verified, written


def make(place: Path, **files: str) -> Manifest:
    source = place.parent / "source"
    source.mkdir(exist_ok=True)
    with written(place, Manifest(tidegate="1")) as writer:
        for name, text in files.items():
            (source / name).write_text(text)
            assert writer.add(f"state/{name}", source / name)
    return writer.manifest


@pytest.mark.parametrize("name", ["b.tar", "b.tgz"])
def test_a_written_backup_can_be_read(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    manifest = make(place, a="one", b="")
    assert verified(place) == manifest
    extract(place, lambda each: tmp_path / "out" / each, manifest)
    assert (tmp_path / "out" / "state" / "a").read_text() == "one"
    assert place.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_bytes_appended_meanwhile_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100)
    with written(tmp_path / "b.tar", Manifest()) as writer, log.open("rb") as file:
        writer.add_open("jobs/log", file)
        with log.open("ab") as more:
            more.write(b"y")
    assert verified(tmp_path / "b.tar").files["jobs/log"].size == 100


def test_a_deleted_file_is_left_out(tmp_path: Path) -> None:
    with written(tmp_path / "b.tar", Manifest()) as writer:
        assert not writer.add("state/a", tmp_path / "absent")
    assert verified(tmp_path / "b.tar").files == {}


def test_a_failed_backup_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written(tmp_path / "b.tar", Manifest()):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["b.tar", "b.tgz"])
def test_a_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    make(place, a="one" * 50)
    good = place.read_bytes()
    # In the first file; in a compressed backup, anywhere.
    at = 512 + 10 if place.suffix == ".tar" else len(good) // 2
    place.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(BackupError):
        verified(place)


@pytest.mark.parametrize("left", [0, 100, 600, 1100])
def test_an_incomplete_backup_is_rejected(tmp_path: Path, left: int) -> None:
    place = tmp_path / "b.tar"
    make(place, a="one", b="two")
    place.write_bytes(place.read_bytes()[:left])
    with pytest.raises(BackupError, match=r"is incomplete|is damaged"):
        verified(place)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "state/../../x", "state//x", "./state/x"])
def test_a_path_outside_of_the_folder_is_rejected(tmp_path: Path, name: str) -> None:
    place = tmp_path / "b.tar"
    with tarfile.open(place, "w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(BackupError, match="outside of its folder"):
        verified(place)


def test_a_link_is_refused(tmp_path: Path) -> None:
    place, link = tmp_path / "b.tar", tarfile.TarInfo("state/a")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(place, "w") as tar:
        tar.addfile(link)
    with pytest.raises(BackupError, match="not a plain file"):
        verified(place)


def test_a_newer_format_is_rejected(tmp_path: Path) -> None:
    place = tmp_path / "b.tar"
    with written(place, Manifest(format=2, tidegate="9.0")):
        pass
    with pytest.raises(
        BackupError, match=r"format 2, .* reads format 1: use the Tidegate that made it \(9.0\)"
    ):
        verified(place)


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    place, sparse = tmp_path / "b.tar", tarfile.TarInfo("state/a")
    sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**50)}
    with tarfile.open(place, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse)
    with pytest.raises(BackupError, match="not a plain file"):
        verified(place)


def test_nobody_else_can_have_the_unfinished_file(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("")
    (tmp_path / f".b.tar.{os.getpid()}.part").symlink_to(theirs)
    make(tmp_path / "b.tar", a="secret")
    assert theirs.read_text() == ""
    assert not (tmp_path / "b.tar").is_symlink()


def test_a_deeply_nested_manifest_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="cannot be read"):
        Manifest.parse(b"[" * 100_000)
