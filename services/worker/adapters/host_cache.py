"""Limit the cache of artifacts and environments, which the workers of a host share.

Each entry of the cache has a file ``<name>.use``. A worker holds a shared lock on this file as long as it
uses the entry. The kernel releases the lock when the worker ends, also after SIGKILL. The file's modification
time is the time of the last known use.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from services.worker.adapters.file_lock import try_exclusive
from tidegate.kernel import telemetry

log = telemetry.logger(__name__)

ENVIRONMENTS = "envs"
BLOCK = 512  # bytes, the unit of st_blocks
_NAME = re.compile(r"[0-9a-f]{64}")
# An entry is deleted together with these files. Its files `.lock` and `.use` stay: another worker may wait
# for one of these locks, and a new file would be a different lock.
_BESIDE = (".ok", ".part", ".log")


class Entry(NamedTuple):
    """An artifact or an environment. ``size``: in bytes. ``used_at``: the last use in Unix time."""

    path: Path
    size: int
    used_at: float


class HostCache:
    """The cache in ``folder``. Entries that no worker uses are deleted if there is too little room.

    ``max_bytes``: the most bytes of all entries; 0 for no limit. ``min_free_bytes``: the bytes of the disk
    that stay free.
    """

    def __init__(self, folder: Path, max_bytes: int = 0, min_free_bytes: int = 0) -> None:
        self.folder = folder.absolute()
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._in_use: list[int] = []

    def use(self, path: Path) -> None:
        """Protect an entry from deletion until :meth:`close` is called.

        The calling code must hold the lock ``<name>.lock``. If the file ``<name>.use`` cannot be opened, for
        example on a full disk, the entry is used without protection.
        """
        try:
            handle = _open_mark(path.with_suffix(".use"))
        except OSError as error:
            log.warning("an entry of the cache is not protected from deletion", extra={"problem": str(error)})
            return
        self._in_use.append(handle)
        # This does not wait: `_delete` locks this file only while it holds `<name>.lock`. Now the calling
        # code holds `<name>.lock`.
        fcntl.flock(handle, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            os.utime(handle)

    def close(self) -> None:
        """Let other workers delete the entries that this one used."""
        for handle in self._in_use:
            with contextlib.suppress(OSError):
                os.utime(handle)
            os.close(handle)
        self._in_use.clear()

    def make_room(self, wanted: int = 0) -> None:
        """Delete unused entries, the longest unused first, until ``wanted`` more bytes fit. This blocks.

        If this cannot be done, log a warning. Never raise an error, because the wanted bytes may fit
        nevertheless.
        """
        try:
            self._make_room(wanted)
        except OSError as error:
            log.warning("the worker's cache cannot be cleaned up", extra={"problem": str(error)})

    def _make_room(self, wanted: int) -> None:
        entries = [*_artifacts(self.folder), *_environments(self.folder / ENVIRONMENTS)]
        size = sum(entry.size for entry in entries)
        missing = self._min_free_bytes + wanted - shutil.disk_usage(self.folder).free
        if missing > size:
            # Something else fills the disk: it would be too full even if all entries were deleted.
            log.warning(
                "the disk of the worker's cache has too little room: delete other files on it",
                extra={"missing_bytes": missing, "cache_bytes": size},
            )
            missing = 0
        if self._max_bytes:
            missing = max(missing, size + wanted - self._max_bytes)
        for entry in sorted(entries, key=lambda entry: entry.used_at):
            if missing <= 0:
                return
            try:
                deleted = _delete(entry)
            except OSError as error:
                log.warning(
                    "an entry of the cache cannot be deleted",
                    extra={"entry": entry.path.name, "problem": str(error)},
                )
                continue
            if deleted:
                missing -= entry.size
                log.info(
                    "an unused entry of the cache was deleted",
                    extra={"entry": entry.path.name, "bytes": entry.size},
                )
        if missing > 0:
            log.warning(
                "the worker's cache has too little room: delete files on its disk, or raise "
                "TIDEGATE_CACHE_MAX_BYTES",
                extra={"missing_bytes": missing, "cache_bytes": size},
            )


def tree_size(path: Path) -> int:
    """Return the bytes that a folder uses on the disk. Files that vanish meanwhile are not counted."""
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += Path(folder, name).lstat().st_blocks * BLOCK
    return size


def _artifacts(folder: Path) -> Iterable[Entry]:
    for path in _entries_in(folder):
        size = sum(_size(each) for each in (path, path.with_suffix(".part")))
        if size:
            yield Entry(path, size, _used_at(path))


def _environments(folder: Path) -> Iterable[Entry]:
    for path in _entries_in(folder):
        home = path.with_suffix(".home")
        if path.is_dir() or home.is_dir():
            yield Entry(path, _environment_size(path) + tree_size(home), _used_at(path))


def _entries_in(folder: Path) -> Iterable[Path]:
    return (folder / name for name in {each.stem for each in folder.glob("*")} if _NAME.fullmatch(name))


def _environment_size(path: Path) -> int:
    """Return an environment's size in bytes, as it was recorded after the build.

    It is not measured again, because that takes seconds if there are many files. If an older release has
    built the environment, measure and record the size now.
    """
    ok = path.with_suffix(".ok")
    with contextlib.suppress(OSError, ValueError):
        return int(json.loads(ok.read_text())["bytes"])
    size = tree_size(path)
    # "r+" does not create a missing file: without the file `.ok`, the environment is incomplete.
    with contextlib.suppress(OSError), ok.open("r+") as record:
        record.write(json.dumps({"bytes": size}))
    return size


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _used_at(path: Path) -> float:
    """Return the time of the last use; without a record of it, the time when the entry was made."""
    for each in (path.with_suffix(".use"), path.with_suffix(".ok"), path):
        with contextlib.suppress(FileNotFoundError):
            return each.stat().st_mtime
    return 0.0


def _open_mark(path: Path) -> int:
    """Open the file ``<name>.use``. If another user owns it, open it only for reading."""
    flags = os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags, 0o644)


def _delete(entry: Entry) -> bool:
    """Delete an entry, unless a worker uses it or prepares it. Return True if it was deleted.

    Raise OSError if a file cannot be deleted.
    """
    path = entry.path
    with try_exclusive(path.with_suffix(".lock")) as locked:
        if not locked:
            return False
        mark = path.with_suffix(".use")
        with try_exclusive(mark) as unused:
            if not unused:
                os.utime(mark)  # the entry is in use now, so its last use is now
                return False
            # Delete the file `.ok` first. If this process is then killed, the entry counts as incomplete.
            parts = (path, path.with_suffix(".home"))
            if not any(each.exists() for each in (*parts, path.with_suffix(".part"))):
                return False  # another worker has deleted it
            for suffix in _BESIDE:
                path.with_suffix(suffix).unlink(missing_ok=True)
            for each in parts:
                if each.is_dir():
                    shutil.rmtree(each)
                else:
                    each.unlink(missing_ok=True)
            return True
