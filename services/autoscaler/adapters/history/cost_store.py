"""The cost ledger on disk: ``<state>/data/costs.db`` (SQLite).

The table ``amounts`` contains the booked time and cost of replicas, by hour. The table ``lives`` contains the
replicas with time that is not in ``amounts`` yet. One transaction changes both tables, so no time is booked
twice if the autoscaler crashes. Old hours are merged into days.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from services.autoscaler.domain.costs.lives import Amount, Life, Place
from tidegate.kernel.protocol.prices import Rate
from tidegate.kernel.protocol.replica_time import Part, Spent
from tidegate.kernel.sqlite_file import Database

DAY_S = 86_400
# Amounts are stored by hour. After this many seconds, the hours of a day are merged.
HOURS_KEPT_S = 35 * DAY_S

SCHEMA = """
CREATE TABLE IF NOT EXISTS lives (replica TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS amounts (
    hour INTEGER NOT NULL, deployment TEXT NOT NULL, model TEXT NOT NULL, version INTEGER NOT NULL,
    kind TEXT NOT NULL, detail TEXT NOT NULL, caller TEXT NOT NULL, endpoint TEXT NOT NULL,
    ns INTEGER NOT NULL, requests INTEGER NOT NULL, rows INTEGER NOT NULL, tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL, tokens_cached INTEGER NOT NULL, cost REAL NOT NULL, token_cost REAL NOT NULL,
    PRIMARY KEY (hour, deployment, model, version, kind, detail, caller, endpoint)) WITHOUT ROWID;
"""
_KEYS = "hour, deployment, model, version, kind, detail, caller, endpoint"
_COUNTS = (*Spent._fields, "cost", "token_cost")
_ADD = f"INSERT INTO amounts VALUES ({', '.join('?' * 16)}) ON CONFLICT DO UPDATE SET " + ", ".join(
    f"{count} = {count} + excluded.{count}" for count in _COUNTS
)
_SUMS = ", ".join(f"sum({count})" for count in _COUNTS)


class CostStore:
    """The cost ledger on disk. Several threads may call it; only the leader writes."""

    def __init__(self, path: Path, days_kept: int = 400) -> None:
        self._days_kept = days_kept
        self._db = Database(path, SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def lives(self) -> list[Life]:
        """Return the ``Life`` of each replica whose time is not completely in the table ``amounts``."""
        return [_life(json.loads(body)) for (body,) in self._db.read("SELECT body FROM lives")]

    def book(self, bookings: Mapping[Place, Amount], lives: Iterable[Life], closed: Sequence[str]) -> None:
        """Add ``bookings`` to the hourly amounts, and update the table ``lives`` in the same transaction.

        ``lives``: the ``Life`` of each replica after these bookings. ``closed``: the names of the replicas
        whose rows are deleted from the table ``lives``.
        """
        rows = [
            (*place[:4], *place.part, *amount.spent, amount.cost, amount.token_cost)
            for place, amount in bookings.items()
        ]
        self._db.write(
            (_ADD, rows),
            ("INSERT OR REPLACE INTO lives VALUES (?, ?)", [(e.replica, _body(e)) for e in lives]),
            ("DELETE FROM lives WHERE replica = ?", [(replica,) for replica in closed]),
        )

    def amounts(self, since: float, until: float, *, hourly: bool = False) -> list[tuple[Place, Amount]]:
        """Return the amounts of the hours from ``since`` to ``until`` (seconds since the epoch).

        With ``hourly``, each hour has amounts of its own. Otherwise the amounts of all hours are added up,
        and ``Place.hour`` is 0. In both cases, each Deployment, version and :class:`Part` has amounts of its
        own.
        """
        hour = "hour" if hourly else "0"
        keys = _KEYS.replace("hour", hour, 1)
        rows = self._db.read(
            f"SELECT {keys}, {_SUMS} FROM amounts WHERE hour >= ? AND hour < ? "
            f"GROUP BY {keys if hourly else _KEYS.partition(', ')[2]}",
            (since, until),
        )
        return [
            (
                Place(row[0], row[1], row[2], row[3], Part(*row[4:8])),
                Amount(Spent(*row[8:14]), row[14], row[15]),
            )
            for row in rows
        ]

    def spent(self, since: float) -> dict[str, float]:
        """Return the cost of each Deployment from ``since`` on. The cost of tokens is included."""
        rows = self._db.read(
            "SELECT deployment, sum(cost) + sum(token_cost) FROM amounts WHERE hour >= ? GROUP BY deployment",
            (since,),
        )
        return dict(rows)

    def by_hour(self, since: float, deployment: str | None) -> dict[int, float]:
        """Return the cost of a Deployment in each hour from ``since`` on. The keys are hours.

        If ``deployment`` is None, return the sum of all Deployments for each hour. Times are in seconds since
        the epoch.
        """
        where = "AND deployment = ?" if deployment is not None else ""
        rows = self._db.read(
            f"SELECT hour, sum(cost) + sum(token_cost) FROM amounts WHERE hour >= ? {where} GROUP BY hour",
            (since, deployment) if deployment is not None else (since,),
        )
        return dict(rows)

    def first_hour(self) -> int | None:
        """Return the first hour with an amount, in seconds since the epoch; None if there is no amount."""
        ((found,),) = self._db.read("SELECT min(hour) FROM amounts")
        return None if found is None else int(found)

    def retire(self, now: float) -> None:
        """Merge old hours into days, and delete days that are too old.

        Hours are merged when they are ``HOURS_KEPT_S`` seconds old. Days are deleted when they are
        ``days_kept`` days old (see the constructor).
        """
        limit = int(now - HOURS_KEPT_S) // DAY_S * DAY_S
        rest = _KEYS.partition(", ")[2]
        old = f"SELECT hour - hour % {DAY_S}, {rest}, {_SUMS} FROM amounts WHERE hour < ? "
        rows = self._db.read(
            f"{old} AND hour % {DAY_S} != 0 GROUP BY hour - hour % {DAY_S}, {rest}", (limit,)
        )
        self._db.write(
            (f"DELETE FROM amounts WHERE hour < ? AND hour % {DAY_S} != 0", [(limit,)]),
            (_ADD, rows),
            ("DELETE FROM amounts WHERE hour < ?", [(int(now) - self._days_kept * DAY_S,)]),
        )


def _body(life: Life) -> str:
    document = {name: getattr(life, name) for name in Life.__slots__}
    counted = [[*part, *spent] for part, spent in life.counted.items()]
    return json.dumps(document | {"rate": life.rate.model_dump(), "counted": counted})


def _life(body: dict[str, object]) -> Life:
    counted = body.pop("counted")
    rate = Rate.model_validate(body.pop("rate"))
    assert isinstance(counted, list)
    parts = {Part(*row[:4]): Spent(*row[4:]) for row in counted}
    return Life(**body, rate=rate, counted=parts)  # type: ignore[arg-type]
