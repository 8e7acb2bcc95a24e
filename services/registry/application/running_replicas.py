"""Store the autoscaler's report of running replicas, and check which artifact a replica may read."""

from __future__ import annotations

from collections.abc import Mapping

from services.registry.adapters.sql import running_replicas as rows
from services.registry.application.transactions import Transactions


class RunningReplicas:
    """Store the list of running replicas, and check which artifact a replica may read.

    The list is stored in the database. So the autoscaler can report to any registry that uses this database.
    """

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def report(self, artifacts: Mapping[str, str]) -> None:
        """Replace the stored list of running replicas.

        ``artifacts``: for each replica the sha256 of its artifact. The autoscaler reports every two seconds.
        So write nothing if the report is unchanged.
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
