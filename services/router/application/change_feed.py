"""Make messages about changes in the registry, from its audit log. Only the leader makes them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence

from services.router.adapters.alert_file import AlertFile, AlertMessage
from services.router.adapters.registry_cache import RegistryCache
from services.router.domain.alerts.notifications import Receiver
from services.router.domain.alerts.registry_changes import RegistryChange
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.repeating_task import RepeatingTask

log = telemetry.logger(__name__)

POLL_S = 1.0
ENTRIES_PER_READ = 500


class ChangeFeed:
    """One of the router's loops. It reads the audit log from where it stopped, and stores messages.

    The position in the audit log and the messages are stored together. So a restart of the router loses no
    change, and makes no message twice.
    """

    def __init__(
        self, registry: RegistryCache, file: AlertFile, sender: str, leads: Callable[[], bool]
    ) -> None:
        """``sender``: the From address of e-mails."""
        self._registry = registry
        self._file = file
        self._sender = sender
        self._leads = leads
        self._revision: int | None = None
        self._failed = False
        self._loop = RepeatingTask("registry changes", self._step, retry_s=POLL_S)
        # A function that is called when there are new messages.
        self.on_messages: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop."""
        await self._loop.stop()

    async def _step(self) -> float:
        if not self._leads():
            self._revision = None  # another router may read the log meanwhile
            return POLL_S
        desired = self._registry.desired
        # A transaction that adds entries also increases the revision. The same revision means no new entry.
        if desired is None or self._registry.problem is not None or desired.revision == self._revision:
            return POLL_S
        revision = desired.revision
        try:
            more = await self._read()
        except Unavailable as error:
            if not self._failed:
                log.warning("changes cannot be reported; trying again", extra={"problem": error.message})
            self._failed = True
            return POLL_S
        self._failed = False
        if more:
            return 0.0
        self._revision = revision
        return POLL_S

    async def _read(self) -> bool:
        """Read new entries, and store their messages. Return True if there may be more.

        Raise Unavailable if the registry or the file cannot be used.
        """
        position = await asyncio.to_thread(self._file.position)
        entries = [] if position is None else await self._registry.changes_after(position, ENTRIES_PER_READ)
        if not entries:
            newest = await self._registry.newest_change()
            # The log is shorter than before if the registry was restored from a backup.
            if position is None or newest < position:
                await asyncio.to_thread(self._file.add_messages, [], newest)
            return False
        changes = [RegistryChange.from_entry(each) for each in entries]
        messages = self._messages(changes, await asyncio.to_thread(self._file.receivers), time.time())
        await asyncio.to_thread(self._file.add_messages, messages, changes[-1].id)
        if messages:
            self.on_messages()
        return len(entries) == ENTRIES_PER_READ

    def _messages(
        self, changes: Sequence[RegistryChange], receivers: Sequence[Receiver], now: float
    ) -> list[AlertMessage]:
        return [
            change_message(change, receiver, self._sender, now)
            for change in changes
            for receiver in receivers
            if receiver.wants_change(change.kind, change.name)
        ]


def change_message(change: RegistryChange, receiver: Receiver, sender: str, now: float) -> AlertMessage:
    """Format a change as a message for one receiver."""
    id_ = f"msg_{int(now * 1e3):012x}{os.urandom(6).hex()}"
    if receiver.kind == "webhook":
        body = change.webhook_body()
    elif receiver.kind == "slack":
        body = change.slack_body()
    else:
        body = bytes(change.email(id_, sender, receiver.to, now))
    return AlertMessage(id_, receiver.name, change.name, change.title, now, now, body)
