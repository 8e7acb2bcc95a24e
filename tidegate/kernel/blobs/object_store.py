"""Open a store by its URL: a folder, an object store, or a store of another fsspec driver.

Folders, ``s3://``, ``gs://`` and ``az://`` work as installed. Credentials come from the environment, under
the names of the vendors' own tools, for example ``AWS_ACCESS_KEY_ID`` and ``AWS_ENDPOINT_URL``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

LOCAL = {"", "file", "local"}
# Protocols that obstore handles, which is installed with Tidegate.
OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
# Protocols of fsspec that cannot be a store.
UNUSABLE = {
    "memory": "keeps its data in one process, but several processes need it",
    **dict.fromkeys(("http", "https", "data", "github", "gist", "git", "jupyter"), "cannot be written"),
}
# The packages that drivers inside of fsspec need.
PACKAGES = {
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
}
GOOD = "Name a folder, s3://, gs:// or az://."
PIECE = 2**20

# A failed request is retried twice. A request fails if no bytes arrive for 30 s, or after an hour.
# The endpoint's URL decides between http and https.
CLIENT: Any = {"connect_timeout": "3s", "read_timeout": "30s", "timeout": "1h", "allow_http": True}
RETRIES: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}


class Stream(NamedTuple):
    """An open file: an iterator over its bytes in pieces, and a function that closes it."""

    pieces: Iterator[bytes]
    close: Callable[[], object]


class Opened(NamedTuple):
    """An open store. ``files`` is an fsspec file system, ``root`` the URL's path in it.

    ``stream`` opens a file for reading, with one request. It raises FileNotFoundError before the first piece
    is read.
    """

    files: Any  # fsspec has no types
    root: str
    stream: Callable[[str], Stream]


def opened(url: str) -> Opened:
    """Open the store at ``url``, without a request to it."""
    if urlsplit(url).scheme in OBJECTS:
        return _objects(url)
    # Imported here, so that a process that never needs it starts faster.
    from fsspec.core import url_to_fs

    files, root = url_to_fs(url)

    def stream(path: str) -> Stream:
        file = files.open(path, "rb")
        return Stream(iter(partial(file.read, PIECE), b""), file.close)

    return Opened(files, root.rstrip("/"), stream)


def problem(setting: str, url: str) -> str | None:
    """Return why ``url`` cannot be a store here, and what to do; None if it can. Sends no request."""
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
        return f"{setting} begins with {scheme}://, a protocol that is not known. {GOOD}"
    known_driver = known_implementations[scheme]
    package = PACKAGES.get(scheme) or known_driver["class"].partition(".")[0]
    return _missing(setting, scheme, package, known_driver.get("err", ""))


def require(service: str, **urls: str) -> None:
    """End the process if one of the settings names a store that cannot work here."""
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


def _objects(url: str) -> Opened:
    import obstore
    from obstore.fsspec import FsspecStore
    from obstore.store import from_url

    parts = urlsplit(url)
    root = f"{parts.netloc}{parts.path}".rstrip("/")
    how: Any = {"client_options": CLIENT, "retry_config": RETRIES}
    files = FsspecStore(parts.scheme, **how)  # type: ignore[call-overload]
    whole = from_url(f"{parts.scheme}://{root}", **how)

    def stream(path: str) -> Stream:
        found = obstore.get(whole, path.removeprefix(f"{root}/"))
        pieces = (bytes(piece) for piece in found.stream(min_chunk_size=PIECE))
        return Stream(pieces, pieces.close)

    return Opened(files, root, stream)
