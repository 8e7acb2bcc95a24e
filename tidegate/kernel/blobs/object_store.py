"""Open a store by its URL: a folder, an object store, or a store of another fsspec driver.

Folders, ``s3://``, ``gs://`` and ``az://`` need no further package. Credentials come from the environment
variables that the vendors' own tools use, for example ``AWS_ACCESS_KEY_ID``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

LOCAL = {"", "file", "local"}
# Protocols that the package obstore handles. It is installed with Tidegate.
OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
# Protocols whose stores can sign URLs with the credentials that also open the store. With a signed URL, a
# program can read a file without credentials.
SIGNED = {"s3", "s3a"}
# Protocols of fsspec that cannot be a store, each with the reason.
UNUSABLE = {
    "memory": "keeps its data in one process, but several processes need it",
    **dict.fromkeys(("http", "https", "data", "github", "gist", "git", "jupyter"), "cannot be written"),
}
# The package that each of fsspec's own drivers needs, by protocol.
PACKAGES = {
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
}
GOOD = "Name a folder, s3://, gs:// or az://."
PIECE = 2**20
# The size of an upload's parts in bytes, and the number of parts that are sent concurrently. Both are low,
# because the parts are held in memory.
PART = 5 * 2**20  # the smallest size that S3 accepts
PARTS_AT_ONCE = 2
# S3 accepts at most 10,000 parts.
MOST_PARTS = 10_000

# A failed request is retried at most twice, and only within 10 s of its start. A request fails if no bytes
# arrive for 30 s, or if it takes more than an hour. http is allowed, so the URL of the store's server decides
# between http and https.
CLIENT: Any = {"connect_timeout": "3s", "read_timeout": "30s", "timeout": "1h", "allow_http": True}
RETRIES: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}


class Stream(NamedTuple):
    """An open file: an iterator over its bytes in pieces, and a function that closes it."""

    pieces: Iterator[bytes]
    close: Callable[[], object]


class Writer(Protocol):
    """A file that is being written to a store. It exists in the store only after ``close``."""

    def write(self, data: Any, /) -> int: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Opened(NamedTuple):
    """An open store.

    ``files``: the fsspec file system of the store. ``root``: the store's path in ``files``.

    ``stream``: opens a file for reading from a given byte on, with one request. If the file does not exist,
    it raises FileNotFoundError before the first piece is read.

    ``writer``: opens a file for writing at most ``size`` bytes.

    ``put``: stores a file of ``size`` bytes from pieces. If reading a piece raises an error, nothing is
    stored.

    ``signed``: returns a URL that opens a file without credentials for a limited time; None if the store
    cannot do this.
    """

    files: Any  # fsspec has no types
    root: str
    stream: Callable[..., Stream]
    writer: Callable[[str, int], Writer]
    put: Callable[[str, int, Iterable[bytes]], object]
    signed: Callable[[str, timedelta], str] | None = None


def opened(url: str) -> Opened:
    """Open the store at ``url``. Send no request to the store yet."""
    if urlsplit(url).scheme in OBJECTS:
        return _objects(url)
    # Import fsspec here: at the top of the module, it would slow down the start of processes that open no
    # store.
    from fsspec.core import url_to_fs

    files, root = url_to_fs(url)

    def stream(path: str, start: int = 0) -> Stream:
        file = files.open(path, "rb")
        file.seek(start)
        return Stream(iter(partial(file.read, PIECE), b""), file.close)

    def writer(path: str, size: int) -> Writer:
        file: Writer = files.open(path, "wb")
        return file

    def put(path: str, size: int, pieces: Iterable[bytes]) -> None:
        file = files.open(path, "wb")
        try:
            for piece in pieces:
                file.write(piece)
        except BaseException:
            with suppress(AttributeError, NotImplementedError):
                file.discard()
            raise
        file.close()

    return Opened(files, root.rstrip("/"), stream, writer, put)


def problem(setting: str, url: str) -> str | None:
    """Return the reason why ``url`` cannot be a store on this machine, or None if it can be one.

    The reason also says how to correct the URL. ``setting``: the setting's name, for the text. No request is
    sent.
    """
    parts = urlsplit(url)
    scheme = parts.scheme
    if scheme in LOCAL:
        return None
    if scheme in UNUSABLE:
        return f"{setting} is {scheme}://..., which {UNUSABLE[scheme]}. {GOOD}"
    if scheme in OBJECTS:
        if not parts.netloc:
            return f"{setting} names no bucket: write {scheme}://BUCKET/PREFIX."
        return _missing(setting, scheme, "obstore", "")
    from fsspec.registry import known_implementations

    if scheme not in known_implementations:
        return f"{setting} begins with {scheme}://, an unknown protocol. {GOOD}"
    known_driver = known_implementations[scheme]
    package = PACKAGES.get(scheme) or known_driver["class"].partition(".")[0]
    return _missing(setting, scheme, package, known_driver.get("err", ""))


def require(service: str, **urls: str) -> None:
    """End the process with a message if a setting has a URL that cannot be a store on this machine."""
    for setting, url in urls.items():
        if (found := problem(f"TIDEGATE_{setting.upper()}", url)) is not None:
            raise SystemExit(f"tidegate {service}: {found}")


def _missing(setting: str, scheme: str, package: str, hint: str) -> str | None:
    try:
        if scheme in OBJECTS:
            import obstore  # noqa: F401
        else:
            from fsspec import get_filesystem_class

            get_filesystem_class(scheme)
    except ImportError as error:
        return (
            f"{setting} begins with {scheme}://, and its driver is not installed: {hint or error}. "
            f"Type: {sys.executable} -m pip install {package}"
        )
    return None


def _without(skipped: int, pieces: Iterable[bytes]) -> Generator[bytes, None, None]:
    """Skip the first ``skipped`` bytes of all pieces together, and yield the rest."""
    for piece in pieces:
        if rest := piece[skipped:]:
            yield rest
        skipped = max(0, skipped - len(piece))


def _read_by(reader: Executor, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Read each piece in the thread of ``reader``, and yield it.

    A separate thread is needed, because obstore cannot read from a store in a thread that is writing to a
    store.
    """
    source = iter(pieces)
    while piece := reader.submit(next, source, b"").result():
        yield piece


def _part(size: int) -> int:
    """Return a size in bytes for the parts of an upload.

    With parts of this size, a file of ``size`` bytes has at most ``MOST_PARTS`` parts.
    """
    return max(PART, -(-size // MOST_PARTS))


def _objects(url: str) -> Opened:
    import obstore
    from obstore.fsspec import FsspecStore
    from obstore.store import from_url

    parts = urlsplit(url)
    root = f"{parts.netloc}{parts.path}".rstrip("/")
    how: Any = {"client_options": CLIENT, "retry_config": RETRIES}
    files = FsspecStore(parts.scheme, **how)  # type: ignore[call-overload]
    whole = from_url(f"{parts.scheme}://{root}", **how)

    def stream(path: str, start: int = 0) -> Stream:
        name = path.removeprefix(f"{root}/")
        ranged: Any = {"range": {"offset": start}} if start else None
        try:
            found, skipped = obstore.get(whole, name, options=ranged), 0
        except obstore.exceptions.GenericError as error:
            # rclone's server answers a request for a range with status 200, which obstore rejects. So request
            # the whole file and skip its beginning.
            if "non-partial" not in str(error):
                raise
            found, skipped = obstore.get(whole, name), start
        pieces = _without(skipped, (bytes(piece) for piece in found.stream(min_chunk_size=PIECE)))
        return Stream(pieces, pieces.close)

    def writer(path: str, size: int) -> Writer:
        name = path.removeprefix(f"{root}/")
        return obstore.open_writer(whole, name, buffer_size=_part(size), max_concurrency=PARTS_AT_ONCE)

    def put(path: str, size: int, pieces: Iterable[bytes]) -> None:
        # Do not use a writer here. Only `obstore.put` aborts the upload if reading a piece raises an error.
        how: Any = {"chunk_size": _part(size), "max_concurrency": PARTS_AT_ONCE}
        with ThreadPoolExecutor(1) as reader:
            read = _read_by(reader, pieces)
            obstore.put(whole, path.removeprefix(f"{root}/"), read, use_multipart=size > PART, **how)

    def signed(path: str, lasts: timedelta) -> str:
        return str(obstore.sign(whole, "GET", path.removeprefix(f"{root}/"), lasts))  # type: ignore[call-overload]

    return Opened(files, root, stream, writer, put, signed if parts.scheme in SIGNED else None)
