"""Back up a stack while it runs: its database, artifacts, jobs, secrets and settings.

No server is stopped, but the order of the copies makes the backup consistent. Artifacts are copied after the
database, so that the backup contains every artifact to which the database refers. Large payloads are copied
before and after the jobs, so that the backup contains every payload to which a job refers.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from tidegate.kernel.settings.base import Settings
from tidegate.stack import databases
from tidegate.stack.backup_file import BackupError, Manifest, Writer, written
from tidegate.stack.plan import is_embedded
from tidegate.version import VERSION

OnStep = Callable[[str, str], None]
"""Called with a part's name and a detail, when the part is in the backup."""

DATABASE = {databases.SQLITE: "database.sqlite", databases.POSTGRESQL: "database.dump"}
STATE, ARTIFACTS, BLOBS, JOBS = "state", "artifacts", "blobs", "jobs"
# Folders below `data` that _state() does not copy. Other functions copy jobs, artifacts and blobs. The backup
# does not contain rabbitmq, valkey and prometheus, because a restored stack does not need their data.
_NOT_AS_FILES = ("rabbitmq", "valkey", "jobs", "artifacts", "blobs", "prometheus")
_TRIES = 3


def is_state(name: str) -> bool:
    """Return True if a backup contains the file ``name`` of the state folder.

    A backup contains the files directly in the state folder, the folder ``secrets``, and parts of the folder
    ``data``. It does not contain programs and run-time records, because a start creates them again.
    """
    first, *rest = name.split("/")
    return not rest or first == "secrets" or (first == "data" and rest[0] not in _NOT_AS_FILES)


def ignore(_: str, __: str) -> None:
    """Do nothing. This is the default for calling code that shows no progress."""


def local_folder(url: str) -> Path | None:
    """Return the folder that a store's URL names; None if the store is not a folder."""
    parts = urlsplit(url)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path) if parts.scheme else url).absolute()


def backup(settings: Settings, place: Path, on_step: OnStep = ignore) -> Manifest:
    """Write a backup of the stack to ``place``.

    ``settings``: the settings of this stack. The backup contains every change that a service had confirmed
    before the call. Raise BackupError if a part cannot be copied.
    """
    state = settings.state_path
    if not (state / "data").is_dir():
        raise BackupError(
            f"{state} has no data of a stack. Go to the folder of `make up`, or set TIDEGATE_STATE_DIR."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in reversed(range(_TRIES)):
        try:
            return _backup(settings, place, on_step)
        except _MissedArtifact as missed:
            if not left:
                raise BackupError(f"{missed}: versions are being deleted; try again.") from None
    raise AssertionError


class _MissedArtifact(Exception):
    """The backup must be repeated, because an artifact is missing.

    The copied database refers to this artifact, but the artifact was deleted before the backup could copy it.
    """


def _backup(settings: Settings, place: Path, on_step: OnStep) -> Manifest:
    manifest = Manifest(
        tidegate=VERSION,
        python=platform.python_version(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        state_dir=str(settings.state_path),
        database=databases.kind_of(settings.database_url),
    )
    with (
        tempfile.TemporaryDirectory(dir=place.parent, prefix=".tidegate-backup-") as aside,
        written(place, manifest) as writer,
    ):
        needed = _database(settings, Path(aside), writer)
        on_step("database", f"{manifest.database}, {_listed(manifest.counts)}")
        _artifacts(settings, writer, needed)
        on_step("artifacts", _amount(manifest, ARTIFACTS))
        _blobs(settings, writer)
        _jobs(settings, writer)
        _blobs(settings, writer)
        on_step("jobs", f"{_amount(manifest, JOBS)}; large payloads: {_amount(manifest, BLOBS)}")
        _state(settings, Path(aside), writer)
        on_step("secrets and settings", _amount(manifest, STATE))
    return manifest


def _database(settings: Settings, aside: Path, writer: Writer) -> set[str]:
    """Add the registry's database. Return the digests of the artifacts to which it refers.

    The set is empty for PostgreSQL, because its dump is not read.
    """
    manifest = writer.manifest
    copy = aside / DATABASE[manifest.database]
    if manifest.database == databases.POSTGRESQL:
        databases.dump_postgresql(settings.database_url, copy)
        writer.add(copy.name, copy)
        return set()
    source = databases.sqlite_path(settings.database_url)
    if not source.is_file():
        manifest.left_out["database"] = f"{source} does not exist: the stack has never run"
        return set()
    databases.copy_sqlite(source, copy)
    manifest.schema, manifest.counts = databases.schema(copy), databases.counts(copy)
    writer.add(copy.name, copy)
    return databases.artifacts(copy) if manifest.schema else set()


def _artifacts(settings: Settings, writer: Writer, needed: set[str]) -> None:
    root = local_folder(settings.artifact_url)
    if root is None:
        writer.manifest.left_out[ARTIFACTS] = (
            f"they are in {settings.artifact_url}, which must be backed up separately"
        )
        return
    copied = set()
    for path in _files(root / "sha256"):
        if writer.add(f"{ARTIFACTS}/{path.relative_to(root)}", path):
            copied.add(path.name)
    if needed - copied:
        raise _MissedArtifact(f"The artifact {min(needed - copied)} is not there")


def _blobs(settings: Settings, writer: Writer) -> None:
    root = local_folder(settings.blob_url)
    if root is None:
        writer.manifest.left_out[BLOBS] = f"they are in {settings.blob_url}"
        return
    for path in _files(root):
        name = f"{BLOBS}/{path.relative_to(root)}"
        if name not in writer.manifest.files:
            writer.add(name, path)


def _jobs(settings: Settings, writer: Writer) -> None:
    """Add the append-only log of the jobs' Valkey.

    All files are opened first, so a file that the server replaces during the copy stays readable. The copy
    can end with an incomplete command. The restored server ignores this command.
    """
    if not is_embedded(settings.jobs_url, settings.jobs_port):
        writer.manifest.left_out[JOBS] = (
            "their Valkey is not part of the stack (TIDEGATE_JOBS_URL); back it up separately"
        )
        return
    folder = settings.state_path / "data" / "jobs" / "appendonlydir"
    for left in reversed(range(_TRIES)):
        with ExitStack() as stack:
            try:
                files = _opened(folder, stack)
            except FileNotFoundError as error:
                if not left:
                    raise BackupError(f"The jobs' log cannot be read: {error}.") from None
                continue
            for name, file in files.items():
                writer.add_open(f"{JOBS}/appendonlydir/{name}", file)
            return


def _opened(folder: Path, stack: ExitStack) -> dict[str, IO[bytes]]:
    manifests = sorted(folder.glob("*.manifest"))
    if not manifests:
        return {}  # the stack never had a job
    manifest = stack.enter_context(manifests[0].open("rb"))
    names = [
        line.split()[1].decode() for line in manifest if line.startswith(b"file ") and b" type h" not in line
    ]
    manifest.seek(0)
    files = {name: stack.enter_context((folder / name).open("rb")) for name in names}
    return {manifests[0].name: manifest, **files}


def _state(settings: Settings, aside: Path, writer: Writer) -> None:
    """Add the rest of the state folder: secrets, settings, dead letters, the autoscaler's history."""
    state = settings.state_path
    registry = databases.sqlite_path(settings.database_url) if writer.manifest.schema else None
    for path in _kept(state):
        name = f"{STATE}/{path.relative_to(state)}"
        if path == registry or path.name.endswith(("-wal", "-shm", "-journal")):
            continue
        if path.suffix == ".db":
            copy = aside / path.name
            databases.copy_sqlite(path, copy)
            writer.add(name, copy)
        else:
            writer.add(name, path)


def _kept(state: Path) -> Iterator[Path]:
    yield from (path for path in sorted(state.iterdir()) if path.is_file() and path.suffix != ".lock")
    yield from _files(state / "secrets")
    for path in sorted((state / "data").iterdir()):
        if path.name not in _NOT_AS_FILES:
            yield from _files(path) if path.is_dir() else [path]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the plain files below a folder, sorted by path. Skip files that are deleted meanwhile."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            yield path


def _amount(manifest: Manifest, part: str) -> str:
    if part in manifest.left_out:
        return f"left out: {manifest.left_out[part]}"
    sizes = [stored.size for name, stored in manifest.files.items() if name.startswith(f"{part}/")]
    return f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items()) or "dumped"
