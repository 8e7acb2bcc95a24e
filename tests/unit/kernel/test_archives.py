"""The registry checks and a worker unpacks the same files of an archive, or both refuse it."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.registry.adapters import archive_reader as judge
from services.registry.adapters import artifact_inspection
from services.worker.adapters import archives as worker
from tests.unit.kernel.archive_files import (
    HONEST,
    OTHER,
    all_files,
    large_directory,
    sparse_tar,
    streamed_zip,
    tar_gz,
    tar_of,
    tarred,
    zip_link,
    zip_with_local_name,
    zip_with_overlap,
    zip_with_unicode_path,
    zipped,
)
from tidegate.kernel.errors import BadRequest, ModelFailed
from tidegate.kernel.protocol.archives import ArchiveLimits

pytestmark = pytest.mark.unit

LIMITS = ArchiveLimits()

GOOD = {
    "zip": zipped(HONEST),
    "zip, stored": zipped(HONEST, method=zipfile.ZIP_STORED),
    "zip, streamed": streamed_zip(HONEST),
    "zip with a comment": zipped(HONEST, comment=b"026450f"),
    "tar": tarred(HONEST),
    "tar, GNU": tarred(HONEST, format_=tarfile.GNU_FORMAT),
    "tar, ustar": tarred(HONEST, format_=tarfile.USTAR_FORMAT),
    "tar.gz": tar_gz(HONEST),
    "tar.gz of two members": gzip.compress(tarred(HONEST)[:700]) + gzip.compress(tarred(HONEST)[700:]),
}

BAD = {
    # Checked as one archive and unpacked as another.
    "a tar with a zip behind it": tarred(HONEST) + zipped(OTHER),
    "a tar.gz with a zip behind it": tar_gz(HONEST) + zipped(OTHER),
    "a zip with a tar behind it": zipped(HONEST) + tarred(OTHER),
    "a zip with a zip behind it": zipped(HONEST) + zipped(OTHER),
    "a tar with a tar behind it": tarred(HONEST) + tarred(OTHER),
    "a tar that begins as a zip": tarred({"PK\x03\x04": b"", **HONEST}) + zipped(OTHER),
    "a zip in the comment of a zip": zipped(HONEST, comment=zipped(OTHER)),
    "a zip with data before it": b"PK\x03\x04 " + zipped(HONEST),
    "a tar with data behind it": tarred(HONEST) + b"x",
    "a tar.gz with data behind it": tar_gz(HONEST) + b"x",
    "a tar with a broken header in it": tarred(HONEST)[:1024] + b"x" * 512 + tarred(HONEST)[1536:],
    "zeros without an end": tarred(HONEST) + bytes(2 * 2**20),
    # Different files for different programs.
    "two names that differ by case": zipped({"1/Model.py": b"1", "1/model.py": b"2"}),
    "two names that differ by Unicode form": zipped({"1/caf\xe9": b"1", "1/cafe\u0301": b"2"}),
    "two names that are equal when folded": zipped({"1/stra\xdfe": b"1", "1/strasse": b"2"}),
    "a name twice in a tar": tarred([(tarfile.TarInfo("a"), b"1"), (tarfile.TarInfo("./a"), b"2")]),
    "a file that is a folder": zipped({"1/a": b"1", "1/a/b": b"2"}),
    "a folder that is a file": zipped({"1/a/b": b"1", "1/A": b"2"}),
    "another name at its place": zip_with_local_name(b"config.pbtxT"),
    "another name in a Unicode field": zip_with_unicode_path(),
    # Not a plain file, or outside of the archive's root.
    "an absolute path": tarred({"/etc/x": b""}),
    "a path that leads out": zipped({"../x": b""}),
    "a symbolic link": tar_of(tarfile.SYMTYPE),
    "a hard link": tar_of(tarfile.LNKTYPE),
    "a device": tar_of(tarfile.CHRTYPE),
    "a pipe": tar_of(tarfile.FIFOTYPE),
    "a symbolic link in a zip": zip_link(),
    "a sparse file": sparse_tar(),
    "a path in a PAX header that leads out": tar_of(b"0", pax={"path": "../../x"}),
    "a size in a PAX header that is negative": tar_of(b"0", pax={"size": "-512"}),
    "a size in a PAX header past the end": tar_of(b"0", pax={"size": str(2**40)}),
    # More data than it seems.
    "entries that overlap": zip_with_overlap(),
    "a directory of 17 MiB": large_directory(),
    "bzip2": zipped(HONEST, method=zipfile.ZIP_BZIP2),
    "lzma": zipped(HONEST, method=zipfile.ZIP_LZMA),
    "a tar.bz2": b"BZh91AY&SY" + bytes(100),
    "a tar.xz": b"\xfd7zXZ\x00" + bytes(100),
}


def looked_into(path: Path) -> judge.ArchiveContents:
    return judge.read_archive(path, names={"model.py"}, max_text=10_000, limits=LIMITS)


@pytest.mark.parametrize("raw", GOOD.values(), ids=GOOD)
def test_an_archive_is_judged_and_unpacked_alike(tmp_path, raw):
    (tmp_path / "a").write_bytes(raw)
    assert looked_into(tmp_path / "a").files == all_files(HONEST)
    worker.unpack(tmp_path / "a", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in HONEST} == HONEST


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD)
def test_what_both_refuse(tmp_path, raw):
    (tmp_path / "a").write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest):
            looked_into(tmp_path / "a")
        with pytest.raises(ModelFailed):
            worker.unpack(tmp_path / "a", tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "out").exists()
    assert peak < 16 * 2**20


def test_torchscript_is_a_zip_and_nothing_else(tmp_path):
    script = zipped({"m/constants.pkl": b"", "m/code/__torch__.py": b"", "m/data.pkl": b""})
    for number, raw in enumerate([tarred(HONEST) + script, script + script, script + b"x"]):
        path = tmp_path / str(number)
        path.write_bytes(raw)
        with pytest.raises(BadRequest, match="not TorchScript"):
            artifact_inspection.inspect(
                path, "torchscript", model="m", user_signature=None, max_batch=1, limits=LIMITS
            )


def test_a_folder_packed_by_the_command_is_taken(tmp_path):
    from tidegate.cli.package import pack

    folder = tmp_path / "model"
    (folder / "1").mkdir(parents=True)
    for name, data in HONEST.items():
        (folder / name).write_bytes(data)
    (folder / "1" / ("long" * 40)).write_bytes(b"a name that needs a PAX header")
    with (tmp_path / "a").open("wb") as target:
        pack(folder, target)
    assert len(looked_into(tmp_path / "a").files) == len(HONEST) + 1
    worker.unpack(tmp_path / "a", tmp_path / "out")


# --- made-up archives -------------------------------------------------------------------------------------

SEEDS = [*GOOD.values(), *(raw for raw in BAD.values() if len(raw) < 100_000)]


@st.composite
def tampered(draw: st.DrawFn) -> bytes:
    """Draw one archive or two in a row, with a few bytes changed, removed or inserted."""
    raw = bytearray(draw(st.sampled_from(SEEDS)))
    if draw(st.booleans()):
        raw += draw(st.sampled_from(SEEDS))
    packed = raw[:2] == b"\x1f\x8b" and draw(st.booleans())
    if packed:
        try:
            raw = bytearray(gzip.GzipFile(fileobj=io.BytesIO(raw)).read())
        except (OSError, EOFError):
            packed = False
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw) - 1) | st.integers(max(0, len(raw) - 200), len(raw) - 1))
        kind = draw(st.sampled_from(["set", "cut", "put", "copy"]))
        if kind == "set":
            raw[at] = draw(st.integers(0, 255))
        elif kind == "put":
            raw[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "copy":
            raw[at:at] = raw[at : at + 512]
        elif len(raw) > 600:
            del raw[at : at + draw(st.sampled_from([1, 4, 512]))]
    return gzip.compress(bytes(raw), 1, mtime=0) if packed else bytes(raw)


@pytest.mark.fuzz
@given(tampered() | st.binary(max_size=1500))
def test_what_is_judged_is_what_is_unpacked(raw):
    """A worker writes only files that the registry has checked. Both raise only refusals."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "a", Path(folder) / "out"
        path.write_bytes(raw)
        tracemalloc.start()
        try:
            seen = looked_into(path)
        except BadRequest:
            seen = None
        try:
            worker.unpack(path, out)
        except ModelFailed:
            assert not out.exists()
            unpacked = None
        else:
            unpacked = {each.relative_to(out) for each in out.rglob("*") if each.is_file()}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if unpacked is not None:
            assert seen is not None, "the worker takes what the registry refuses"
            assert {str(each) for each in unpacked} == {str(each) for each in seen.files}
            for where, text in seen.texts.items():
                assert (out / where).read_text() == text
        assert peak < 16 * 2**20 + 100 * len(raw)
