"""The files of an environment: whose they are while pip runs, and afterwards."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tidegate.kernel.errors import ModelFailed


def is_whole(path: Path) -> bool:
    """Return True for a finished environment that a model's user can read."""
    marker = path / "pyvenv.cfg"
    return (
        path.with_suffix(".ok").exists()
        and (path / "bin" / "python3").exists()
        and bool(marker.stat().st_mode & stat.S_IROTH)
    )


def hand_over(path: Path, uid: int | None) -> None:
    """Give a new environment, which holds only files of ours, to the model's user; None: it stays ours."""
    if uid is None:
        return
    for each in _tree(path):
        os.chown(each, uid, uid, follow_symlinks=False)


def take_over(path: Path, uid: int | None) -> None:
    """Make the environment ours and readable by all; where it was a model's user's, no longer writable.

    No process of that user runs any more. Raises ModelFailed for a file that is neither the user's nor a
    link or folder: a hard link to somebody else's file, which must keep its owner and mode.
    """
    ours = os.geteuid() if uid is None else uid
    for each in _tree(path):
        _take(each, ours, uid)


def _tree(path: Path) -> Iterator[Path]:
    """The folder, its files and its folders; a link to a folder is passed over."""
    for folder, _, files in os.walk(path):
        yield Path(folder)
        yield from (Path(folder, name) for name in files)


def _take(path: Path, expected: int, uid: int | None) -> None:
    found = path.lstat()
    if found.st_uid != expected:
        raise ModelFailed(f"The installation of the requirements left {path}, which belongs to another user.")
    if uid is not None:
        os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
        path.chmod(_readable(found.st_mode, keep_write=uid is None))


def _readable(mode: int, *, keep_write: bool) -> int:
    """A mode with which everybody may read, and execute what its owner may; never set-user-ID."""
    runs = 0o111 if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0
    # The owner of a folder removes it one day.
    writes = stat.S_IWUSR if stat.S_ISDIR(mode) or (keep_write and mode & stat.S_IWUSR) else 0
    return 0o444 | runs | writes
