"""The file ``<state>/data/alerts.db`` (SQLite): alerts, silences, receivers and messages to receivers.

It also stores how far the registry's audit log has been reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from services.router.domain.alerts.notifications import Receiver
from services.router.domain.alerts.silences import Silence
from services.router.domain.alerts.states import Alert
from tidegate.kernel.sqlite_file import Database

EVENTS_KEPT = 10_000
MESSAGES_KEPT = 1_000

SCHEMA = """
CREATE TABLE IF NOT EXISTS alerts (
    endpoint TEXT NOT NULL, rule TEXT NOT NULL, subject TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (endpoint, rule, subject)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, endpoint TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS silences (
    id TEXT PRIMARY KEY, until REAL NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS receivers (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS messages (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, receiver TEXT NOT NULL, endpoint TEXT NOT NULL,
    title TEXT NOT NULL, made REAL NOT NULL, next REAL NOT NULL, attempt INTEGER NOT NULL,
    state TEXT NOT NULL, detail TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS messages_by_receiver ON messages (state, receiver, next);
CREATE TABLE IF NOT EXISTS changes (position INTEGER NOT NULL);
"""

MessageState = Literal["waiting", "delivered", "given_up"]


@dataclass(frozen=True, slots=True)
class AlertMessage:
    """A message to one receiver.

    ``endpoint``: the alert's endpoint, or the name of the changed object. ``next_at``: the Unix time of the
    next attempt to send the message. ``attempt``: the number of attempts so far.
    """

    id: str
    receiver: str
    endpoint: str
    title: str
    made_at: float
    next_at: float
    body: bytes
    attempt: int = 0
    state: MessageState = "waiting"
    detail: str = ""

    def public(self) -> dict[str, Any]:
        """Return the message without its body."""
        names = ("id", "receiver", "endpoint", "title", "made_at", "next_at", "attempt", "state", "detail")
        return {name: getattr(self, name) for name in names}


_DROP_WAITING = "DELETE FROM messages WHERE receiver = ? AND state = 'waiting'"
_MESSAGE = "id, receiver, endpoint, title, made, next, body, attempt, state, detail"


class AlertFile:
    """Stores alerts, silences, receivers and messages. Several threads may use it. Only the leader writes."""

    def __init__(self, path: Path, *, timeout_s: float = 5.0) -> None:
        self._db = Database(path, SCHEMA, owner="router", timeout_s=timeout_s)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def alerts(self) -> list[Alert]:
        """Return all alerts."""
        return [Alert.from_json(orjson.loads(body)) for (body,) in self._db.read("SELECT body FROM alerts")]

    def commit(
        self, alerts: Iterable[Alert], events: Sequence[Alert], messages: Sequence[AlertMessage], now: float
    ) -> None:
        """Replace all alerts, and add events and messages, in one transaction.

        So the new states of alerts and the messages about them are stored together or not at all.
        """
        self._db.write(
            ("DELETE FROM alerts", [()]),
            ("INSERT INTO alerts VALUES (?, ?, ?, ?)", [(*each.key, _body(each)) for each in alerts]),
            (
                "INSERT INTO events (at, endpoint, body) VALUES (?, ?, ?)",
                [(now, each.endpoint, _body(each)) for each in events],
            ),
            ("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", [(EVENTS_KEPT,)]),
            *_added(messages),
        )

    def position(self) -> int | None:
        """Return the id of the last entry of the audit log that needs no message; None if none is stored."""
        return next((int(position) for (position,) in self._db.read("SELECT position FROM changes")), None)

    def add_messages(self, messages: Sequence[AlertMessage], position: int) -> None:
        """Add messages about changes that are not stored yet, and raise the position, in one transaction.

        Two routers may do this for the same changes, if one of them does not know yet that the other leads.
        """
        self._db.write(
            *_added(messages),
            ("INSERT INTO changes SELECT ? WHERE NOT EXISTS (SELECT * FROM changes)", [(position,)]),
            ("UPDATE changes SET position = max(position, ?)", [(position,)]),
        )

    def reset_position(self, old: int, new: int) -> None:
        """Set the position from ``old`` to ``new``, because the audit log has become shorter.

        If the position is no longer ``old``, do nothing.
        """
        self._db.write(("UPDATE changes SET position = ? WHERE position = ?", [(new, old)]))

    def events(self, endpoint: str | None, limit: int) -> list[Alert]:
        """Return the last alerts that fired or were resolved, newest first."""
        where, values = ("WHERE endpoint = ?", (endpoint, limit)) if endpoint else ("", (limit,))
        rows = self._db.read(f"SELECT body FROM events {where} ORDER BY id DESC LIMIT ?", values)
        return [Alert.from_json(orjson.loads(body)) for (body,) in rows]

    def silences(self, now: float) -> list[Silence]:
        """Return the silences that have not ended."""
        rows = self._db.read("SELECT body FROM silences WHERE until > ? ORDER BY until", (now,))
        return [Silence.from_json(orjson.loads(body)) for (body,) in rows]

    def save_silence(self, silence: Silence, now: float) -> None:
        """Store a silence, and delete silences that ended more than a day ago."""
        row = (silence.id, silence.until, orjson.dumps(silence.to_json()))
        self._db.write(
            ("INSERT OR REPLACE INTO silences VALUES (?, ?, ?)", [row]),
            ("DELETE FROM silences WHERE until < ?", [(now - 86_400.0,)]),
        )

    def drop_silence(self, id_: str) -> None:
        """Delete a silence."""
        self._db.write(("DELETE FROM silences WHERE id = ?", [(id_,)]))

    def receivers(self) -> list[Receiver]:
        """Return the receivers, sorted by name."""
        rows = self._db.read("SELECT body FROM receivers ORDER BY name")
        return [Receiver.from_json(orjson.loads(body)) for (body,) in rows]

    def save_receiver(self, receiver: Receiver) -> None:
        """Create or replace a receiver.

        Messages that wait for the old one are deleted if they have another format or another subject (alerts
        or changes).
        """
        old = next((each for each in self.receivers() if each.name == receiver.name), receiver)
        stale = old.kind != receiver.kind or bool(old.changes) != bool(receiver.changes)
        row = (receiver.name, orjson.dumps(receiver.to_json()))
        self._db.write(
            ("INSERT OR REPLACE INTO receivers VALUES (?, ?)", [row]),
            (_DROP_WAITING, [(receiver.name,)] if stale else []),
        )

    def drop_receiver(self, name: str) -> None:
        """Delete a receiver, and the messages that still wait to be sent to it."""
        self._db.write(
            ("DELETE FROM receivers WHERE name = ?", [(name,)]),
            (_DROP_WAITING, [(name,)]),
        )

    def due(self, receiver: str, now: float, limit: int) -> list[AlertMessage]:
        """Return at most ``limit`` waiting messages to a receiver that may be sent now, earliest first."""
        query = (
            f"SELECT {_MESSAGE} FROM messages WHERE state = 'waiting' AND receiver = ? AND next <= ? "
            "ORDER BY next, number LIMIT ?"
        )
        return [AlertMessage(*row) for row in self._db.read(query, (receiver, now, limit))]

    def without_receiver(self, limit: int) -> list[AlertMessage]:
        """Return at most ``limit`` waiting messages whose receiver was removed while they were made."""
        query = (
            f"SELECT {_MESSAGE} FROM messages WHERE state = 'waiting' "
            "AND receiver NOT IN (SELECT name FROM receivers) LIMIT ?"
        )
        return [AlertMessage(*row) for row in self._db.read(query, (limit,))]

    def messages(self, limit: int) -> list[AlertMessage]:
        """Return the last messages, newest first."""
        rows = self._db.read(f"SELECT {_MESSAGE} FROM messages ORDER BY number DESC LIMIT ?", (limit,))
        return [AlertMessage(*row) for row in rows]

    def settle(self, id_: str, state: MessageState, attempt: int, next_at: float, detail: str) -> None:
        """Store the result of an attempt to send a message."""
        row = (state, attempt, next_at, detail, id_)
        self._db.write(
            ("UPDATE messages SET state = ?, attempt = ?, next = ?, detail = ? WHERE id = ?", [row])
        )


def _added(messages: Sequence[AlertMessage]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Return the statements that add messages and delete the oldest settled ones, with their values."""
    names = (
        "id",
        "receiver",
        "endpoint",
        "title",
        "made_at",
        "next_at",
        "body",
        "attempt",
        "state",
        "detail",
    )
    return [
        (
            f"INSERT OR IGNORE INTO messages ({_MESSAGE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [tuple(getattr(message, name) for name in names) for message in messages],
        ),
        (
            "DELETE FROM messages WHERE state <> 'waiting' "
            "AND number <= (SELECT max(number) FROM messages) - ?",
            [(MESSAGES_KEPT,)],
        ),
    ]


def _body(alert: Alert) -> bytes:
    return orjson.dumps(alert.to_json())
