"""Delete versions and models, restore deleted ones, and remove them permanently."""

from __future__ import annotations

from datetime import timedelta

from services.registry.adapters.sql import deleted, policies
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.application.artifacts import Artifacts
from services.registry.application.transactions import Transactions
from services.registry.domain import removal
from services.registry.domain.desired_state import ChangeNotification, DropVersion, RestoreVersion


class Deletion:
    """Delete versions. They can be restored during ``grace``; with a grace of 0, deletion is permanent."""

    def __init__(self, transactions: Transactions, artifacts: Artifacts, grace: timedelta) -> None:
        self._transactions = transactions
        self._artifacts = artifacts
        self.grace = grace

    async def delete_version(self, model: str, number: int, *, permanent: bool) -> None:
        """Delete a version. With ``permanent`` or a grace of 0, it cannot be restored.

        After a permanent deletion, also delete the version's artifact if no other version uses it. Raise
        NotFound if the version does not exist. Raise Conflict if a Deployment runs the version, or if an
        alias points to it.
        """
        for_good = permanent or not self.grace
        await self._transactions.decide(
            lambda now: removal.delete_version(now, model, number, permanent=for_good), _no_result
        )
        if for_good:
            await self._artifacts.collect()

    async def delete_model(self, model: str, *, cascade: bool, permanent: bool) -> list[ChangeNotification]:
        """Delete all versions of a model, and return the changes.

        ``cascade`` True: also delete the model's aliases, its Deployments and their Endpoints. ``cascade``
        False: raise Conflict if the model has aliases or a Deployment runs it.
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
        """Restore a deleted version, or all deleted versions of a model (``number`` None).

        Return the numbers of the restored versions. Raise NotFound if nothing can be restored.
        """
        async with self._transactions.change() as writer:
            changes = removal.restore(await writer.snapshot(), model, number)
            await writer.apply(changes)
        return [change.number for change in changes if isinstance(change, RestoreVersion)]

    async def purge(self) -> int:
        """Permanently remove versions that were deleted longer ago than ``grace``. Return how many."""
        count = 0
        before = self._transactions.now() - self.grace
        while True:
            async with self._transactions.read() as reader:
                if not await deleted.expired(reader.connection, before):
                    return count
            async with self._transactions.change() as writer:
                # Read once more: a version could have been restored since the first read.
                gone = await deleted.expired(writer.connection, before)
                await writer.apply([DropVersion(model, number) for model, number in gone])
                await policies.drop_unused(writer.connection)
                count += len(gone)


async def _no_result(_: DesiredStateReader) -> None:
    return None
