"""Restore a backup into a state folder: verify it, write it to temporary folders, then rename the folders."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path, PurePosixPath

from tidegate.kernel.settings.base import Settings
from tidegate.stack import databases, processes, stopping
from tidegate.stack.backup import (
    ARTIFACTS,
    BLOBS,
    DATABASE,
    JOBS,
    STATE,
    OnStep,
    ignore,
    is_state,
    local_folder,
)
from tidegate.stack.backup_file import BackupError, Manifest, extract, verified

# The parts of a state folder that are a stack's data. `make up` or a start of the stack creates all other
# parts.
_DATA = ("data", "secrets", "token", "webhook-secret", "metrics")


def restore(settings: Settings, place: Path, *, force: bool = False, on_step: OnStep = ignore) -> Manifest:
    """Restore a backup to the state folder, the database and the stores that ``settings`` names.

    Raise BackupError if the backup is damaged. Without ``force``, also raise BackupError if the stack runs or
    if the restore would replace data. With ``force``, stop a running stack, move existing files aside, and
    replace tables in PostgreSQL.
    """
    manifest = verified(place)
    on_step("checksums", f"{len(manifest.files)} files agree")
    layout = Layout(settings, manifest)
    layout.check()
    if processes.marked(settings.state_path):
        if not force:
            raise BackupError(
                f"The stack in {settings.state_path} runs: type `tidegate down`, restore into another folder "
                "(--into DIR), or use --force to stop it and replace its data."
            )
        stopping.down(settings)
        on_step("stack", "stopped")
    there = layout.taken()
    if there and not force:
        raise BackupError(
            f"Data exists already: {', '.join(map(str, there[:4]))}. Restore into another folder "
            "(--into DIR), or use --force. It moves files aside, but it replaces tables in PostgreSQL."
        )
    before = os.umask(0o077)
    try:
        _carry_out(layout, place, there, force=force, on_step=on_step)
    finally:
        os.umask(before)
    return manifest


class Layout:
    """The paths to which the parts of a backup are restored. They depend on the settings."""

    def __init__(self, settings: Settings, manifest: Manifest) -> None:
        self.state = settings.state_path
        self.manifest = manifest
        self.database_url = settings.database_url
        kind = databases.kind_of(settings.database_url)
        if manifest.database not in DATABASE:
            raise BackupError(f"The manifest names an unknown kind of database: {manifest.database!r:.80}.")
        if DATABASE[manifest.database] in manifest.files and kind != manifest.database:
            raise BackupError(
                f"The backup has a {manifest.database} database, but TIDEGATE_DATABASE_URL names a {kind} "
                f"database. Set this variable to the URL of a {manifest.database} database."
            )
        self.roots = {STATE: self.state, JOBS: self.state / "data" / "jobs"}
        for part, name in ((ARTIFACTS, "artifact_url"), (BLOBS, "blob_url")):
            root = local_folder(getattr(settings, name))
            if root is not None:
                self.roots[part] = root
            elif any(each.startswith(f"{part}/") for each in manifest.files):
                raise BackupError(
                    f"The backup has {part} as files, but TIDEGATE_{name.upper()} names an object store. Set "
                    "this variable to a folder and restore. Then copy the files to the object store, and "
                    "set the variable to the object store again."
                )

    @property
    def dump(self) -> bool:
        """Return True if the backup's database is a dump of PostgreSQL."""
        return DATABASE[databases.POSTGRESQL] in self.manifest.files

    def target(self, name: str) -> Path:
        """Return the path to which a file is restored. Raise BackupError for an unknown name."""
        part, _, rest = name.partition("/")
        if name == DATABASE[databases.SQLITE]:
            return databases.sqlite_path(self.database_url)
        if name == DATABASE[databases.POSTGRESQL]:
            return self.state / name
        if part not in self.roots or not rest or (part == STATE and not is_state(rest)):
            raise BackupError(f"The backup has a file that this Tidegate does not know: {name!r}.")
        return self.roots[part] / PurePosixPath(rest)

    def check(self) -> None:
        """Raise BackupError if the backup has an unknown file."""
        for name in self.manifest.files:
            self.target(name)

    def outside(self) -> list[Path]:
        """Return the folders and files that the backup restores outside of the state folder."""
        places = [root for root in self.roots.values() if not root.is_relative_to(self.state)]
        if DATABASE[databases.SQLITE] in self.manifest.files:
            path = databases.sqlite_path(self.database_url)
            places += [] if path.is_relative_to(self.state) else [path]
        return places

    def taken(self) -> list[Path | str]:
        """Return existing data that the restore would replace."""
        found: list[Path | str] = [path for name in _DATA if _filled(path := self.state / name)]
        found += [path for path in self.outside() if _filled(path)]
        if self.dump and not databases.postgresql_is_empty(self.database_url):
            found.append("the tables in PostgreSQL")
        return found


def _carry_out(layout: Layout, place: Path, there: list[Path | str], *, force: bool, on_step: OnStep) -> None:
    layout.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = {layout.state: layout.state / f".restore-{stamp}-{os.getpid()}"}
    aside |= {
        path: path.with_name(f".{path.name}.restore-{stamp}-{os.getpid()}") for path in layout.outside()
    }

    def staged(name: str) -> Path:
        target = layout.target(name)
        root = next(root for root in aside if target == root or target.is_relative_to(root))
        return aside[root] / target.relative_to(root)

    try:
        extract(place, staged, layout.manifest)
        on_step("files", f"{len(layout.manifest.files)} written")
        if layout.dump:
            dump = staged(DATABASE[databases.POSTGRESQL])
            databases.load_postgresql(layout.database_url, dump, replace=force)
            dump.unlink()
            on_step("database", "loaded into PostgreSQL")
        kept = _move_aside(layout, [path for path in there if isinstance(path, Path)], stamp)
        if kept:
            on_step("earlier data", f"moved to {kept}")
        for root, new in aside.items():
            if root != layout.state and new.exists():
                new.replace(root)
        for new in sorted(aside[layout.state].iterdir()):
            new.replace(layout.state / new.name)
    finally:
        for new in aside.values():
            shutil.rmtree(new, ignore_errors=True)
            new.unlink(missing_ok=True)


def _move_aside(layout: Layout, there: list[Path], stamp: str) -> Path | None:
    """Move existing files aside, so that they are not lost.

    Return the new folder inside the state folder; None if ``there`` is empty. Files and folders outside of
    the state folder are not moved to the new folder. They are renamed where they are.
    """
    if not there:
        return None
    old = layout.state / f"before-restore-{stamp}"
    old.mkdir(mode=0o700)
    for path in there:
        inside = path.is_relative_to(layout.state)
        path.replace(old / path.name if inside else path.with_name(f"{path.name}.before-restore-{stamp}"))
    # Also move the single files that the backup would replace.
    for name in {name.partition("/")[2] for name in layout.manifest.files if name.startswith(f"{STATE}/")}:
        if "/" not in name and (layout.state / name).is_file():
            (layout.state / name).replace(old / name)
    return old


def _filled(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))
