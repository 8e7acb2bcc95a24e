"""Archives that would write outside of their folder, or fill the disk."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from services.worker.adapters.archives import LIMITS, unpack
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.archives import ArchiveLimits

pytestmark = pytest.mark.unit


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size, info.mode = len(member[1]), 0o4777
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def refused(archive: Path, into: Path, match: str, limits: ArchiveLimits = LIMITS) -> None:
    with pytest.raises(ModelFailed, match=match):
        unpack(archive, into, limits)
    assert not into.exists()


def test_plain_files_come_out(tmp_path: Path) -> None:
    files = {"m/config.pbtxt": b"max_batch_size: 1", "m/1/model.py": b"x = 1"}
    unpack(zipped(tmp_path / "a.zip", files), tmp_path / "zip")
    unpack(tarred(tmp_path / "a.tar.gz", list(files.items())), tmp_path / "tar")
    for kind in ("zip", "tar"):
        assert {n: (tmp_path / kind / n).read_bytes() for n in files} == files
        assert not (tmp_path / kind / "m/1/model.py").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\..\\x"])
def test_paths_that_lead_out(tmp_path: Path, name: str) -> None:
    refused(zipped(tmp_path / "a.zip", {name: b"x"}), tmp_path / "out", "below its root")
    refused(tarred(tmp_path / "a.tgz", [(name, b"x")]), tmp_path / "out", "below its root")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_tar_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("m")
    info.type, info.linkname = kind, "/etc"
    refused(
        tarred(tmp_path / "a.tgz", [info, ("m/passwd", b"x")]),
        tmp_path / "out",
        "only plain files and folders are accepted",
    )


def test_zip_link(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("m")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")
    refused(tmp_path / "a.zip", tmp_path / "out", "only plain files and folders are accepted")


def test_bomb(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"m/1/zeros": bytes(4_000_000)})
    refused(
        archive,
        tmp_path / "out",
        "more than 10 times its size",
        ArchiveLimits(ratio=10, ratio_from_bytes=1_000_000),
    )
    refused(archive, tmp_path / "out", "more than 5 bytes", ArchiveLimits(unpacked_bytes=5))


def test_a_file_larger_than_its_declared_size(tmp_path: Path) -> None:
    """The checks count declared sizes, so nothing beyond them is written."""
    path = zipped(tmp_path / "a.zip", {"m/1/zeros": bytes(4_000_000)})
    raw = path.read_bytes().replace((4_000_000).to_bytes(4, "little"), (1_000).to_bytes(4, "little"))
    path.write_bytes(raw)
    refused(path, tmp_path / "out", "cannot be unpacked")


def test_too_many_files(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {f"m/{n}": b"" for n in range(11)})
    refused(archive, tmp_path / "out", "more than 10 entries", ArchiveLimits(members=10))


def test_the_same_file_twice(tmp_path: Path) -> None:
    refused(tarred(tmp_path / "a.tgz", [("m", b"1"), ("m", b"2")]), tmp_path / "out", "has 'm' twice")


def test_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    refused(tmp_path / "a", tmp_path / "out", "cannot be unpacked")


def test_a_cut_archive(tmp_path: Path) -> None:
    whole = tarred(tmp_path / "a.tgz", [("m/1/model.py", bytes(range(256)) * 400)])
    (tmp_path / "cut.tgz").write_bytes(whole.read_bytes()[:200])
    refused(tmp_path / "cut.tgz", tmp_path / "out", "cannot be unpacked")
