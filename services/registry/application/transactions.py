"""Run transactions on the registry's data, and publish a notification of each committed change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from typing import TypeVar

from services.registry.adapters.change_notifier import ChangeNotifier
from services.registry.adapters.sql.database import RegistryDatabase
from services.registry.adapters.sql.etags import etag_of
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.domain import regions, stages, verification
from services.registry.domain.desired_state import Change, RegistrySnapshot
from services.registry.domain.preconditions import Precondition

T = TypeVar("T")

# The precondition of the current request. The first write transaction of the request checks it.
expected: ContextVar[Precondition | None] = ContextVar("expected", default=None)


class Transactions:
    """Run the transactions of all API modules, and publish a notification of each change."""

    def __init__(self, database: RegistryDatabase, notifier: ChangeNotifier) -> None:
        self._database = database
        self.notifier = notifier

    def now(self) -> datetime:
        """Return the registry's current time."""
        return self._database.clock()

    def read(self) -> AbstractAsyncContextManager[DesiredStateReader]:
        """Open a read transaction. All its reads see the same revision.

        Raise Unavailable if the database fails.
        """
        return self._database.read()

    @asynccontextmanager
    async def change(self) -> AsyncIterator[DesiredStateWriter]:
        """Open a write transaction. Publish its notifications only after the commit.

        If the request has a precondition, its first write transaction checks the precondition before anything
        else. Raise PreconditionFailed if the object of the precondition is not in the required state.
        """
        async with self._database.write() as writer:
            if (precondition := expected.get()) is not None:
                precondition.check(await etag_of(writer, precondition.kind, precondition.name))
                expected.set(None)
            yield writer
        self.notifier.notify(writer.next_revision, writer.notifications)

    async def decide(
        self,
        decision: Callable[[RegistrySnapshot], Sequence[Change]],
        result: Callable[[DesiredStateWriter], Awaitable[T]],
    ) -> T:
        """Apply the changes that ``decision`` returns. Then return what ``result`` reads.

        Both functions run in the same transaction. If either raises an error, the transaction is rolled back.
        """
        async with self.change() as writer:
            await _apply(writer, decision)
            return await result(writer)

    async def preview(
        self,
        decision: Callable[[RegistrySnapshot], Sequence[Change]],
        result: Callable[[DesiredStateWriter], Awaitable[T]],
    ) -> T:
        """Return what ``result`` reads after the changes of ``decision``, and roll the changes back.

        Raise the same errors as :meth:`decide`.
        """
        found: list[T] = []
        with suppress(_RolledBack):
            async with self.change() as writer:
                await _apply(writer, decision)
                found.append(await result(writer))
                raise _RolledBack
        return found[0]


class _RolledBack(Exception):
    """End a transaction without a commit."""


async def _apply(
    writer: DesiredStateWriter, decision: Callable[[RegistrySnapshot], Sequence[Change]]
) -> None:
    snapshot = await writer.snapshot()
    changes = decision(snapshot)
    regions.check(snapshot.after(changes), changes)
    verification.check(snapshot, changes)
    stages.check(snapshot, changes)
    await writer.apply(changes)
