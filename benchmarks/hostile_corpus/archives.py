"""Hostile archives: bombs, paths that lead out, links, clashes, and files that are two things at once."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable

from benchmarks.hostile_corpus.case import Case, raw

MIB = 2**20
CONFIG = b'backend: "python"'
Maker = Callable[[], bytes]


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of these files, also if a name occurs twice."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of a name that occurs twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes], packed: bool = False) -> bytes:
    """Return a tar or tar.gz of these entries."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz" if packed else "w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    """Return a tar entry."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_of(*names: str) -> Maker:
    """Return a maker of a zip with these names."""
    return lambda: zipped(*((name, CONFIG) for name in names))


def tar_of(info: tarfile.TarInfo) -> Maker:
    """Return a maker of a tar with a good file and this entry."""
    return lambda: tarred((entry("config.pbtxt"), CONFIG), (info, b""))


def zip_bomb() -> bytes:
    """Return a zip whose only file unpacks to 300 MiB."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("config.pbtxt", "w") as out,
    ):
        for _ in range(300):
            out.write(bytes(MIB))
    return file.getvalue()


def gzip_bomb() -> bytes:
    """Return a tar.gz whose only file unpacks to 300 MiB."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    info = entry("config.pbtxt")
    info.size = 300 * MIB
    parts = [packer.compress(info.tobuf())]
    parts += [packer.compress(bytes(MIB)) for _ in range(300)]
    return b"".join([*parts, packer.compress(bytes(10240)), packer.flush()])


def lying_size() -> bytes:
    """Return a zip that states 4 GB for a file of a few bytes."""
    data = bytearray(zipped(("config.pbtxt", CONFIG)))
    at = data.find(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 0xFFFFFFF0)
    return bytes(data)


def encrypted() -> bytes:
    """Return a zip whose file is marked as encrypted."""
    data = bytearray(zipped(("config.pbtxt", CONFIG)))
    for at in (data.find(b"PK\x03\x04") + 6, data.find(b"PK\x01\x02") + 8):
        data[at] |= 1
    return bytes(data)


def overlapping() -> bytes:
    """Return a zip with two entries of the directory for the same bytes."""
    data = zipped(("config.pbtxt", CONFIG), ("config2pbtxt", CONFIG))
    first, second = data.find(b"PK\x01\x02"), data.rfind(b"PK\x01\x02")
    changed = bytearray(data)
    changed[second + 42 : second + 46] = data[first + 42 : first + 46]
    return bytes(changed)


def two_names() -> bytes:
    """Return a zip whose file has one name in its header and another in the directory."""
    data = zipped(("config.pbtxt", CONFIG))
    return data.replace(b"config.pbtxt", b"../../passwd", 1)


def many() -> bytes:
    """Return a zip with 10,001 files."""
    return zipped(*((f"1/{number}", b"") for number in range(10_001)), compression=zipfile.ZIP_STORED)


def sparse() -> bytes:
    """Return a tar with a sparse file of a petabyte."""
    info = entry("config.pbtxt", tarfile.GNUTYPE_SPARSE)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"777777777777"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(10240)


def long_header() -> bytes:
    """Return a tar whose extended header has 64 MiB."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 64 * MIB
    return info.tobuf() + b"a" * (5 * MIB) + bytes(10240)


def cut() -> bytes:
    """Return the first half of a tar.gz."""
    whole = tarred((entry("config.pbtxt"), bytes(range(256)) * 4000), packed=True)
    return whole[: len(whole) // 2]


PATH, REFUSED = "is not a path below its root", "only plain files and folders"
CASES: tuple[Case, ...] = (
    Case("zip bomb", "m.zip", zip_bomb, "more than 100 times its size"),
    Case("tar.gz bomb", "m.tar.gz", gzip_bomb, "more than 100 times its size"),
    Case("zip that lies about a size", "m.zip", lying_size, "more than 100 times|cannot be read"),
    Case("gzip in gzip", "m.tar.gz", lambda: gzip.compress(gzip.compress(b"x")), "compressed by gzip"),
    Case(
        "zip in zip",
        "m.zip",
        lambda: zipped(("inner.zip", zipped(("a", b"")))),
        "not a Triton model directory",
    ),
    Case("zip with ..", "m.zip", zip_of("config.pbtxt", "../../.bashrc"), PATH),
    Case("zip with an absolute path", "m.zip", zip_of("config.pbtxt", "/etc/cron.d/x"), PATH),
    Case("zip with backslashes", "m.zip", zip_of("config.pbtxt", "..\\..\\x"), f"{PATH}|two names"),
    Case("zip with a drive letter", "m.zip", zip_of("config.pbtxt", "C:x"), PATH),
    Case("zip with a path of 40 folders", "m.zip", zip_of("config.pbtxt", "a/" * 40 + "x"), PATH),
    Case("zip with a line break in a name", "m.zip", zip_of("1/a\nb\x1b[2J", "2/x"), "control characters"),
    Case("zip with names that differ by case", "m.zip", zip_of("config.pbtxt", "Config.pbtxt"), "twice"),
    Case("zip with names that differ by Unicode form", "m.zip", zip_of("1/\u00e9", "1/e\u0301"), "twice"),
    Case("zip with a file twice", "m.zip", zip_of("config.pbtxt", "config.pbtxt"), "twice|cannot be read"),
    Case(
        "zip with a file below a file",
        "m.zip",
        zip_of("config.pbtxt", "1", "1/model.py"),
        "a file in it|as a folder",
    ),
    Case("zip that is encrypted", "m.zip", encrypted, REFUSED),
    Case(
        "zip by bzip2",
        "m.zip",
        lambda: zipped(("config.pbtxt", CONFIG), compression=zipfile.ZIP_BZIP2),
        REFUSED,
    ),
    Case(
        "zip with overlapping files",
        "m.zip",
        overlapping,
        "does not begin where|one name in its header|cannot be",
    ),
    Case("zip with two names for a file", "m.zip", two_names, "one name in its header|cannot be read"),
    Case(
        "zip behind a program",
        "m.zip",
        lambda: b"MZ" + bytes(62) + zipped(("config.pbtxt", CONFIG)),
        "program",
    ),
    Case(
        "zip with data behind it",
        "m.zip",
        lambda: zipped(("config.pbtxt", CONFIG)) + b"x" * 100,
        "after the end",
    ),
    Case("zip of 10,001 files", "m.zip", many, "more than 10000 entries"),
    Case("zip without a directory", "m.zip", raw(b"PK\x03\x04" + bytes(60)), "no end record"),
    Case("tar with a symbolic link", "m.tar", tar_of(entry("1", tarfile.SYMTYPE, "/etc")), REFUSED),
    Case("tar with a hard link", "m.tar", tar_of(entry("x", tarfile.LNKTYPE, "../../x")), REFUSED),
    Case("tar with a device", "m.tar", tar_of(entry("x", tarfile.CHRTYPE)), REFUSED),
    Case("tar with a pipe", "m.tar", tar_of(entry("x", tarfile.FIFOTYPE)), REFUSED),
    Case("tar with ..", "m.tar", tar_of(entry("1/../../x")), PATH),
    Case("tar with an absolute path", "m.tar", tar_of(entry("/root/.ssh/authorized_keys")), PATH),
    Case("tar with a sparse file of a petabyte", "m.tar", sparse, f"{REFUSED}|more than|cannot be read"),
    Case("tar with a header of 64 MiB", "m.tar", long_header, "more than 4 MiB|cannot be read"),
    Case("tar.gz that is cut off", "m.tar.gz", cut, "cannot be read"),
    Case(
        "tar with data behind it",
        "m.tar",
        lambda: tarred((entry("config.pbtxt"), CONFIG)) + b"x",
        "after the end",
    ),
)
