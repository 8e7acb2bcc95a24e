"""A copy of the registry's keys in memory and on disk, so no request waits for the registry."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import httpx
import orjson

from services.gateway.domain.key_table import KeyTable
from services.gateway.domain.lease_messages import PriorUsage
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import EVENTS, REGISTRY_CHANGED, events_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.http.certificates import trusted

log = telemetry.logger(__name__)

POLL_S = 2.0
TIMEOUT_S = 2.0


class KeyCache:
    """A cache of the registry's table of keys.

    The table is read from the registry every 2 s, and also after each published change.

    A revoked key works until the next read of the table. The next read usually follows some milliseconds
    after the change. While the broker is away, it follows after up to 2 s. While the registry is away, no key
    can be revoked.

    ``on_change``: called with each new table.
    """

    def __init__(
        self,
        registry_url: str,
        token: str,
        disk: Path,
        on_change: Callable[[KeyTable], None],
        *,
        amqp_url: str,
        incarnation: str,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=registry_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=TIMEOUT_S,
            trust_env=False,
            verify=trusted(registry_url),
        )
        self._disk = disk
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._problem: str | None = None
        self._events = events_queue("gateway", incarnation)
        self.connection = Connection(amqp_url, "gateway keys", self._setup)
        self.table: KeyTable | None = None

    async def start(self) -> None:
        """Read the table from the disk, then from the registry. Then keep it up to date in the background."""
        with contextlib.suppress(FileNotFoundError):
            self._take(self._disk.read_bytes(), "disk")
        await self._refresh()
        self.connection.start()
        self._task = asyncio.create_task(self._run(), name="keys")

    async def stop(self) -> None:
        """Stop reading."""
        await tasks.end(self._task)
        await self.connection.stop()
        await self._http.aclose()

    async def prior_usage(self, principal: str, day: str) -> PriorUsage:
        """Return how many requests of a principal the registry counted on ``day`` and in the day's month.

        Raise Unavailable if the registry does not report the counts.
        """
        path, query = f"/v1/usage/{quote(principal, safe='')}/quota", {"day": day}
        if "/" in principal:
            path, query = "/v1/usage/quota", {"principal": principal, "day": day}
        try:
            answer = await self._http.get(path, params=query)
            counts = answer.raise_for_status().json()
            return PriorUsage(principal, day, day[:7], int(counts["day"]), int(counts["month"]))
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise Unavailable(
                f"the registry did not report the usage: {error or type(error).__name__}"
            ) from error

    async def _setup(self, channel: Channel) -> None:
        def on_delivery(delivery: Delivery) -> None:
            if orjson.loads(bytes(delivery.body)).get("kind") == "key":
                self._changed.set()

        await channel.declare(EVENTS)
        await channel.declare(self._events)
        await channel.bind(self._events, EVENTS, REGISTRY_CHANGED)
        await channel.consume(self._events, on_delivery, prefetch=100, no_ack=True)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait()
            self._changed.clear()
            await self._refresh()

    async def _refresh(self) -> None:
        known = {"If-None-Match": f'"{self.table.mark}"'} if self.table is not None else {}
        try:
            answer = await self._http.get("/v1/keys/table", headers=known)
            if answer.status_code != 304:
                answer.raise_for_status()
        except httpx.HTTPError as error:
            self._note(f"{error or type(error).__name__}")
            return
        self._note(None)
        if answer.status_code != 304 and self._take(answer.content, "registry"):
            await asyncio.to_thread(self._keep, answer.content)

    def _note(self, problem: str | None) -> None:
        if problem is not None and self._problem is None:
            log.warning(
                "the keys could not be read from the registry; the last known keys stay in use",
                extra={"problem": problem},
            )
        self._problem = problem

    def _take(self, raw: bytes, source: str) -> bool:
        try:
            table = KeyTable.from_dict(orjson.loads(raw))
        except (ValueError, KeyError, TypeError) as error:
            # Log only the error's type. Its message can quote the input, which contains the keys' digests.
            log.error(
                "the table of keys cannot be parsed; the last valid table stays in use",
                extra={"problem": type(error).__name__},
            )
            return False
        self.table = table
        log.info("keys", extra={"count": len(table.keys), "mark": table.mark, "source": source})
        self._on_change(table)
        return True

    def _keep(self, raw: bytes) -> None:
        # Several gateway processes can replace the table's file at the same moment. So each process first
        # writes a temporary file of its own.
        fresh = self._disk.with_suffix(f".{os.getpid()}")
        try:
            self._disk.parent.mkdir(parents=True, exist_ok=True)
            fresh.touch(0o600)
            fresh.write_bytes(raw)
            fresh.replace(self._disk)
        except OSError as error:
            log.warning("keys cannot be written to disk", extra={"problem": str(error)})
