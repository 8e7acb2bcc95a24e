"""Delete versions and models, restore them for a while, and remove them for good."""

from __future__ import annotations

from datetime import timedelta

from services.registry.adapters.sql import deleted, policies
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.application.artifacts import Artifacts
from services.registry.application.transactions import Transactions
from services.registry.domain import removal
from services.registry.domain.desired_state import ChangeNotification, DropVersion, RestoreVersion


class Deletion:
    """Deletes versions. For ``grace`` they can be restored; with a grace of 0 they are gone at once."""

    def __init__(self, transactions: Transactions, artifacts: Artifacts, grace: timedelta) -> None:
        self._transactions = transactions
        self._artifacts = artifacts
        self.grace = grace

    async def delete_version(self, model: str, number: int, *, permanent: bool) -> None:
        """Delete a version; with ``permanent`` for good, and its artifact if no other version uses it.

        Raise NotFound, or Conflict if it is in use.
        """
        for_good = permanent or not self.grace
        await self._transactions.decide(
            lambda now: removal.delete_version(now, model, number, permanent=for_good), _no_result
        )
        if for_good:
            await self._artifacts.collect()

    async def delete_model(self, model: str, *, cascade: bool, permanent: bool) -> list[ChangeNotification]:
        """Delete all versions of a model; with ``cascade`` also its Deployments and their Endpoints.

        Return the changes. Without ``cascade``, raise Conflict while the model is in use.
        """
        for_good = permanent or not self.grace
        async with self._transactions.change() as writer:
            now = await writer.snapshot()
            await writer.apply(removal.delete_model(now, model, cascade=cascade, permanent=for_good))
            if for_good:
                await policies.drop_unused(writer.connection)
        if for_good:
            await self._artifacts.collect()
        return writer.notifications

    async def restore(self, model: str, number: int | None) -> list[int]:
        """Restore a deleted version, or all of a model (None). Return their numbers. Raise NotFound."""
        async with self._transactions.change() as writer:
            changes = removal.restore(await writer.snapshot(), model, number)
            await writer.apply(changes)
        return [change.number for change in changes if isinstance(change, RestoreVersion)]

    async def purge(self) -> int:
        """Remove for good the versions whose grace time is over. Return their number."""
        count = 0
        before = self._transactions.now() - self.grace
        while True:
            async with self._transactions.read() as reader:
                if not await deleted.expired(reader.connection, before):
                    return count
            async with self._transactions.change() as writer:
                # Read again, because a version may have been restored meanwhile.
                gone = await deleted.expired(writer.connection, before)
                await writer.apply([DropVersion(model, number) for model, number in gone])
                await policies.drop_unused(writer.connection)
                count += len(gone)


async def _no_result(_: DesiredStateReader) -> None:
    return None
