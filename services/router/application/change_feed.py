"""Make messages about changes in the registry, from its audit log. Only the leader makes them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.router.adapters.alert_file import AlertFile, AlertMessage
from services.router.adapters.registry_cache import RegistryCache
from services.router.domain.alerts.notifications import Receiver
from services.router.domain.alerts.registry_changes import RegistryChange
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.repeating_task import RepeatingTask

log = telemetry.logger(__name__)

POLL_S = 1.0
# The beginning of the ids of messages about changes.
CHANGE_PREFIX = "msg_change_"
ENTRIES_PER_READ = 50


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
        self._page = ENTRIES_PER_READ
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
            self._page = max(1, self._page // 2)  # a page of large entries may take too long
            return POLL_S
        self._failed = False
        self._page = ENTRIES_PER_READ
        if more:
            return 0.0
        self._revision = revision
        return POLL_S

    async def _read(self) -> bool:
        """Read new entries, and store their messages. Return True if there may be more.

        Raise Unavailable if the registry or the file cannot be used.
        """
        position = await asyncio.to_thread(self._file.position)
        entries = [] if position is None else await self._registry.changes_after(position, self._page)
        if not entries:
            newest = await self._registry.newest_change()
            # The log is shorter than before if the registry was restored from a backup.
            if position is None:
                await asyncio.to_thread(self._file.add_messages, [], newest)
            elif newest < position:
                await asyncio.to_thread(self._file.reset_position, position, newest)
            return False
        if await asyncio.to_thread(self._store, entries, time.time()):
            self.on_messages()
        return len(entries) == self._page

    def _store(self, entries: Sequence[Mapping[str, Any]], now: float) -> bool:
        """Store the messages about these entries. Return True if there are any. This runs in a thread."""
        receivers = self._file.receivers()
        changes = [RegistryChange.from_entry(each) for each in entries]
        messages = [
            change_message(change, receiver, self._sender, now)
            for change in changes
            for receiver in receivers
            if receiver.wants_change(change.kind, change.name)
        ]
        self._file.add_messages(messages, changes[-1].id)
        return bool(messages)


def change_message(change: RegistryChange, receiver: Receiver, sender: str, now: float) -> AlertMessage:
    """Format a change as a message for one receiver. The message has the same id if this is done twice."""
    # Without the time, a change would have an old id after a restore of the registry, which repeats ids.
    digest = hashlib.sha256(f"{change.id} {change.at} {receiver.name}".encode()).hexdigest()
    id_ = f"{CHANGE_PREFIX}{digest[:24]}"
    if receiver.kind == "webhook":
        body = change.webhook_body()
    elif receiver.kind == "slack":
        body = change.slack_body()
    else:
        body = bytes(change.email(id_, sender, receiver.to, now))
    return AlertMessage(id_, receiver.name, change.name, change.title, now, now, body)
