"""The replicas that run now, as the autoscaler reports them, and what their tokens open."""

from __future__ import annotations

from collections.abc import Mapping

from services.registry.adapters.sql import running_replicas as rows
from services.registry.application.transactions import Transactions


class RunningReplicas:
    """The running replicas. The autoscaler reports them to any registry of the database."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def report(self, artifacts: Mapping[str, str]) -> None:
        """Replace the set of running replicas; each has the sha256 of the artifact that it may read.

        The autoscaler reports every two seconds, so a report that changes nothing writes nothing.
        """
        async with self._transactions.read() as reader:
            if await rows.all_of(reader.connection) == artifacts:
                return
        async with self._transactions.change() as writer:
            await rows.replace(writer.connection, await rows.all_of(writer.connection), artifacts)

    async def may_read(self, replica: str, sha256: str) -> bool:
        """Return True if the replica runs and the artifact is its own."""
        async with self._transactions.read() as reader:
            return await rows.artifact_of(reader.connection, replica) == sha256
