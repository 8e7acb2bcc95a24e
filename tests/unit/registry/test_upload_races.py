"""Uploads in two registries that share a database and a folder, at unlucky moments."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.registry.adapters.artifacts import ArtifactStore
from services.registry.adapters.sql import migrate
from services.registry.adapters.sql.database import RegistryDatabase
from services.registry.application.artifacts import Artifacts
from services.registry.application.transactions import Transactions
from services.registry.application.uploads import Uploads
from services.registry.domain.uploads import Upload, UploadLimits
from tidegate.kernel.errors import Conflict

pytestmark = pytest.mark.unit

CONTENT = bytes(range(256)) * 16
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HOUR = timedelta(hours=1)
NO_NOTIFIER = cast(Any, SimpleNamespace(notify=lambda *_: None))


class Shared:
    """A database and a folder, the registries that share them, and their clock."""

    def __init__(self, folder: Path, url: str) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.folder = folder
        self._url = url
        self.databases: list[RegistryDatabase] = []

    def registry(self) -> tuple[Uploads, Artifacts]:
        database = RegistryDatabase(self._url, lambda: self.now)
        self.databases.append(database)
        transactions = Transactions(database, NO_NOTIFIER)
        artifacts = Artifacts(transactions, ArtifactStore(str(self.folder), max_bytes=10_000), HOUR)
        return Uploads(transactions, artifacts, UploadLimits(9, 10**6, 10**6, 24 * HOUR)), artifacts


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[Shared]:
    url = f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    await migrate.migrate(url)
    found = Shared(tmp_path / "artifacts", url)
    yield found
    for database in found.databases:
        await database.close()


async def sent(uploads: Uploads) -> Upload:
    opened, _ = await uploads.open("me", SHA256, len(CONTENT))

    async def chunks() -> AsyncIterator[bytes]:
        yield CONTENT

    return await uploads.append("me", opened.id, 0, chunks(), None)


async def test_both_registries_check_the_same_upload(shared: Shared) -> None:
    (one, _), (two, _) = shared.registry(), shared.registry()
    upload = await sent(one)
    assemble = two._store.assemble

    async def slowly(*args: Any) -> str:
        await one._finish(upload)
        return await assemble(*args)

    two._store.assemble = slowly  # type: ignore[method-assign, assignment]
    assert (await two.get("me", upload.id)).state == "stored"


async def test_late_bytes_do_not_change_what_was_sent(shared: Shared) -> None:
    (one, _), (two, _) = shared.registry(), shared.registry()
    stale, _ = await one.open("me", SHA256, len(CONTENT))
    upload = await sent(two)
    with pytest.raises(Conflict):
        await one._commit(stale, bytearray(b"other bytes"))
    assert (shared.folder / "uploads" / upload.id).read_bytes() == CONTENT
    assert (await two.get("me", upload.id)).state == "stored"


async def test_a_stored_artifact_is_kept_for_the_caller_that_wants_to_register_it(shared: Shared) -> None:
    uploads, artifacts = shared.registry()
    await uploads.get("me", (await sent(uploads)).id)
    shared.now += 0.9 * HOUR
    opened, _ = await uploads.open("me", SHA256, len(CONTENT))
    assert opened.state == "stored"
    shared.now += 0.9 * HOUR
    await artifacts.collect()
    assert await artifacts.size(SHA256) == len(CONTENT)


async def test_an_artifact_whose_file_is_gone_is_sent_again(shared: Shared) -> None:
    uploads, artifacts = shared.registry()
    await uploads.get("me", (await sent(uploads)).id)
    await artifacts.store.remove(SHA256)
    upload = await sent(uploads)
    assert (await uploads.get("me", upload.id)).state == "stored"
    assert await artifacts.store.has(SHA256)
