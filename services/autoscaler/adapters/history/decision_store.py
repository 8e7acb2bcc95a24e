"""The autoscaler's durable state: ``<state>/data/autoscaler.db`` (SQLite).

It contains:

- the last generation of each replica slot. A Deployment has a slot for each of its replicas. Each launch in a
  slot gets the next generation. So the replica's name, ``<deployment>-<slot>-<generation>``, is never used
  twice
- the cordoned hosts, on which no more replicas start
- the offers to the warm pool. An offer asks the pool for a worker that becomes a replica. If a worker took
  the offer, the worker's name is stored too
- the overrides that the registry has not received yet. An override fixes the number of replicas of a
  Deployment
- a limited number of decisions and cold starts

A call takes less than a millisecond. A failed call raises ``Unavailable``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from services.autoscaler.domain.snapshot import Decision, LocalOverride
from services.autoscaler.domain.warm_pool import WarmClaim
from tidegate.kernel.sqlite_file import Database

COLD_STARTS_KEPT = 20

SCHEMA = """
CREATE TABLE IF NOT EXISTS generations (
    deployment TEXT NOT NULL, slot INTEGER NOT NULL, generation INTEGER NOT NULL,
    PRIMARY KEY (deployment, slot)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS overrides (
    deployment TEXT PRIMARY KEY, replicas INTEGER, expires_at REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS forced_overrides (deployment TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (
    replica TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, launched_at REAL NOT NULL,
    drain_limit_s REAL NOT NULL, worker TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cordons (host TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS decisions (
    id INTEGER PRIMARY KEY, deployment TEXT NOT NULL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS decisions_by_deployment ON decisions (deployment, id);
CREATE TABLE IF NOT EXISTS cold_starts (
    id INTEGER PRIMARY KEY, deployment TEXT NOT NULL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS cold_starts_by_deployment ON cold_starts (deployment, id);
"""


class DecisionStore:
    """The autoscaler's decisions, cold starts, overrides and generations, in a file.

    Several threads may call it. Only the leader writes to it.
    """

    def __init__(self, path: Path, decisions_kept: int = 5000, *, timeout_s: float = 5.0) -> None:
        self._kept = decisions_kept
        self._db = Database(path, SCHEMA, timeout_s=timeout_s)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def generations(self) -> dict[tuple[str, int], int]:
        """Return the last generation of each replica slot. The keys are (Deployment, number of the slot)."""
        rows = self._db.read("SELECT deployment, slot, generation FROM generations")
        return {(deployment, slot): generation for deployment, slot, generation in rows}

    def save_generation(self, deployment: str, slot: int, generation: int) -> None:
        """Store the generation of a replica slot, unless a higher generation is stored.

        The calling code must do this before it starts a replica with this generation.
        """
        statement = (
            "INSERT INTO generations VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
            "SET generation = max(generation, excluded.generation)"
        )
        self._db.write((statement, [(deployment, slot, generation)]))

    def overrides(self) -> dict[str, LocalOverride]:
        """Return the overrides that the registry has not received yet, by Deployment.

        An override fixes the number of replicas of one Deployment.
        """
        rows = self._db.read("SELECT deployment, replicas, expires_at FROM overrides")
        forced = {name for (name,) in self._db.read("SELECT deployment FROM forced_overrides")}
        return {name: LocalOverride(replicas, expires, name in forced) for name, replicas, expires in rows}

    def save_override(self, deployment: str, override: LocalOverride) -> None:
        """Store an override that the registry does not have yet."""
        row = (deployment, override.replicas, override.expires_at)
        self._db.write(
            ("INSERT OR REPLACE INTO overrides VALUES (?, ?, ?)", [row]),
            ("DELETE FROM forced_overrides WHERE deployment = ?", [(deployment,)]),
            ("INSERT INTO forced_overrides VALUES (?)", [(deployment,)] if override.force else []),
        )

    def drop_override(self, deployment: str) -> None:
        """Delete an override."""
        self._db.write(
            ("DELETE FROM overrides WHERE deployment = ?", [(deployment,)]),
            ("DELETE FROM forced_overrides WHERE deployment = ?", [(deployment,)]),
        )

    def claims(self) -> list[WarmClaim]:
        """Return the stored offers. An offer asks the warm pool for a worker that becomes a replica.

        An offer is stored before it is sent. If no worker takes it, it is deleted. If a worker takes it, it
        stays stored until the replica has ended.
        """
        rows = self._db.read("SELECT replica, fingerprint, launched_at, drain_limit_s, worker FROM claims")
        return [WarmClaim(*row) for row in rows]

    def save_claim(self, claim: WarmClaim) -> None:
        """Store an offer to the warm pool, or replace the stored offer of the same replica.

        The calling code must do this before it sends the offer, and again when a worker has taken the offer.
        """
        self._db.write(("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?)", [astuple(claim)]))

    def drop_claim(self, replica: str) -> None:
        """Delete the offer of ``replica``, because no worker took it or because the replica has ended."""
        self._db.write(("DELETE FROM claims WHERE replica = ?", [(replica,)]))

    def cordons(self) -> dict[str, float]:
        """Return the cordoned hosts, each with the time of its cordon (seconds since the epoch)."""
        return dict(self._db.read("SELECT host, at FROM cordons"))

    def cordon(self, host: str, at: float) -> None:
        """Store that a host is cordoned. A second cordon does not change the time of the first."""
        self._db.write(("INSERT OR IGNORE INTO cordons VALUES (?, ?)", [(host, at)]))

    def uncordon(self, host: str) -> None:
        """Delete the cordon of a host."""
        self._db.write(("DELETE FROM cordons WHERE host = ?", [(host,)]))

    def add_decisions(self, decisions: Sequence[Decision]) -> None:
        """Store decisions. Then delete the oldest ones, so that only the newest remain.

        The constructor's ``decisions_kept`` is the number of decisions that remain, of all Deployments
        together.
        """
        rows = [(decision.deployment, json.dumps(asdict(decision))) for decision in decisions]
        self._db.write(
            ("INSERT INTO decisions (deployment, body) VALUES (?, ?)", rows),
            ("DELETE FROM decisions WHERE id <= (SELECT max(id) FROM decisions) - ?", [(self._kept,)]),
        )

    def decisions(self, deployment: str | None, limit: int) -> list[dict[str, Any]]:
        """Return at most ``limit`` decisions of a Deployment, newest first.

        If ``deployment`` is None, return decisions of all Deployments.
        """
        where = "WHERE deployment = ?" if deployment else ""
        values: tuple[Any, ...] = (deployment, limit) if deployment else (limit,)
        rows = self._db.read(f"SELECT body FROM decisions {where} ORDER BY id DESC LIMIT ?", values)
        return [json.loads(body) for (body,) in rows]

    def add_cold_start(self, deployment: str, cold_start: dict[str, Any]) -> None:
        """Store a cold start. Of each Deployment, keep only the last ``COLD_STARTS_KEPT`` cold starts."""
        body = json.dumps(cold_start)
        self._db.write(
            ("INSERT INTO cold_starts (deployment, body) VALUES (?, ?)", [(deployment, body)]),
            (
                "DELETE FROM cold_starts WHERE deployment = ? AND id NOT IN "
                "(SELECT id FROM cold_starts WHERE deployment = ? ORDER BY id DESC LIMIT ?)",
                [(deployment, deployment, COLD_STARTS_KEPT)],
            ),
        )

    def cold_starts(self) -> dict[str, list[dict[str, Any]]]:
        """Return the last cold starts of every Deployment, newest first."""
        found: dict[str, list[dict[str, Any]]] = {}
        for deployment, body in self._db.read("SELECT deployment, body FROM cold_starts ORDER BY id DESC"):
            found.setdefault(deployment, []).append(json.loads(body))
        return found
