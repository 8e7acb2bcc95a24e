"""Archives for tests, made byte by byte if a library would refuse to make them."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import PurePosixPath

Files = dict[str, bytes]
HONEST: Files = {"config.pbtxt": b"max_batch_size: 1\n", "1/model.py": b"x = 1\n" * 50, "1/empty": b""}
OTHER: Files = {"config.pbtxt": b"max_batch_size: 2\n", "1/model.py": b"import os\n"}


def zipped(files: Files, *, method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.comment = comment
    return buffer.getvalue()


def streamed_zip(files: Files) -> bytes:
    """Return a zip with the sizes after the data, as from a writer that cannot seek."""

    class Stream(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            self.data += bytes(data)
            return len(data)

    stream = Stream()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.data


def tarred(files: Files | list[tuple[tarfile.TarInfo, bytes]], *, format_: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_gz(files: Files) -> bytes:
    return gzip.compress(tarred(files), mtime=0)


def tar_of(type_: bytes, name: str = "1/x", size: int = 0, pax: dict[str, str] | None = None) -> bytes:
    """Return a tar with one member of a type."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = type_, "/etc/passwd", size, pax or {}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(-size % 512 + size) + bytes(1024)


def sparse_tar() -> bytes:
    """Return a tar with a GNU sparse file of 64 GiB in a few bytes."""
    return tar_of(b"0", pax={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**36), "GNU.sparse.name": "x"})


def zip_link() -> bytes:
    info = zipfile.ZipInfo("1/x")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def zip_with_local_name(name: bytes) -> bytes:
    """Return a zip whose first entry has another name than in the directory."""
    whole = zipped(HONEST)
    size = struct.unpack_from("<H", whole, 26)[0]
    assert len(name) == size
    return whole[:30] + name + whole[30 + size :]


def zip_with_overlap() -> bytes:
    """Return a zip with many names for the same data, which unpacks to many times its size."""
    whole = zipped({"a": bytes(100_000), "b": b"x"})
    directory = whole.index(b"PK\x01\x02")
    second = whole.index(b"PK\x01\x02", directory + 1)
    entry = bytearray(whole[second:])
    struct.pack_into("<L", entry, 42, 0)  # the second entry's place is the first one's
    return whole[:second] + bytes(entry)


def zip_with_unicode_path() -> bytes:
    """Return a zip with an extra field that newer programs read the name from."""
    info = zipfile.ZipInfo("1/model.py")
    name = b"../../model.py"
    info.extra = struct.pack("<HHBL", 0x7075, 5 + len(name), 1, 0) + name
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, "x")
    return buffer.getvalue()


def large_directory() -> bytes:
    """Return a zip that has only a directory, of 17 MiB."""
    size = 17 * 2**20
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, size, 4, 0)
    return b"PK\x03\x04" + bytes(size) + end


def all_files(files: Files) -> set[PurePosixPath]:
    return {PurePosixPath(name) for name in files}
