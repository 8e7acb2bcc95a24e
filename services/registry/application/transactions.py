"""Transactions on the registry's data. Each committed change is published as change notifications."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import TypeVar

from services.registry.adapters.change_notifier import ChangeNotifier
from services.registry.adapters.sql.database import RegistryDatabase
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.domain.desired_state import Change, RegistrySnapshot

T = TypeVar("T")


class Transactions:
    """The one way to the database for all API modules: read, decide with a pure function, write, notify."""

    def __init__(self, database: RegistryDatabase, notifier: ChangeNotifier) -> None:
        self._database = database
        self.notifier = notifier

    def now(self) -> datetime:
        """Return the time by the registry's clock."""
        return self._database.clock()

    def read(self) -> AbstractAsyncContextManager[DesiredStateReader]:
        """Open a read transaction: everything read in it is of one revision. Raise Unavailable."""
        return self._database.read()

    @asynccontextmanager
    async def change(self) -> AsyncIterator[DesiredStateWriter]:
        """Open a write transaction. Publish its changes after the commit, and only then."""
        async with self._database.write() as writer:
            yield writer
        self.notifier.notify(writer.next_revision, writer.notifications)

    async def decide(
        self,
        decision: Callable[[RegistrySnapshot], Sequence[Change]],
        result: Callable[[DesiredStateReader], Awaitable[T]],
    ) -> T:
        """Apply the changes that ``decision`` makes to the desired state, and return what ``result`` reads.

        Both run in the same transaction. Errors that ``decision`` raises undo it.
        """
        async with self.change() as writer:
            await writer.apply(decision(await writer.snapshot()))
            return await result(writer)
