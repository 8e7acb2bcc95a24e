"""Replay dead letters as jobs.

The job belongs to the operator who requests the replay, not to the caller of the original request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from services.router.application.dead_letters import DeadLetters
from services.router.domain.dead_letters import DeadLetter, Replay, endpoint_of, job_of_letter
from services.router.domain.exceptions import UNDECODABLE
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import jobs_queue
from tidegate.kernel.errors import Conflict, NotFound, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.jobs import Job, NewJob, new_id, read_id
from tidegate.kernel.store import JobStore

log = telemetry.logger(__name__)

CONNECT_S = 10.0


class Replays:
    """The replay of dead letters as jobs.

    ``table``: a function that returns the route table. ``ttl_s``: seconds after which a job expires.
    ``retention_s``: seconds for which a job's result is stored.
    """

    def __init__(
        self,
        letters: DeadLetters,
        jobs: JobStore,
        claims: Claims,
        out: Connection,
        table: Callable[[], dict[str, Any] | None],
        *,
        ttl_s: float,
        retention_s: float,
    ) -> None:
        self._letters = letters
        self._jobs = jobs
        self._claims = claims
        self._out = out
        self._table = table
        self._ttl_s = ttl_s
        self._retention_s = retention_s

    async def replay(self, letter: DeadLetter, to: str | None, principal: str) -> DeadLetter:
        """Run a letter's request again as a job. Return the letter with this replay.

        ``to``: the Deployment that runs the job; None means the Deployment of the letter.

        Raise Conflict if the letter has no request, NotFound if its payload or the Deployment does not exist,
        and Unavailable if a store fails or there is no route table.
        """
        if letter.cause == UNDECODABLE:
            raise Conflict(
                f"dead letter {letter.letter} could not be decoded as a request, so it cannot run "
                "again: `tidegate dead download` saves its bytes"
            )
        deployment = to or letter.deployment
        table = self._table()
        if table is None:
            raise Unavailable("there is no route table yet", retry_after_s=1.0)
        route = table["deployments"].get(deployment)
        if route is None:
            raise NotFound(f"there is no deployment {deployment!r}: name an existing one with `--to`")
        new = await self._new(letter, deployment, route, table["endpoints"], principal)
        await self._jobs.accept(new)
        await self._publish(new)
        log.info(
            "dead letter replayed", extra={"letter": letter.letter, "job": new.id.hex(), "by": principal}
        )
        return self._letters.add_replay(letter, Replay(new.id.hex(), deployment, time.time()))

    async def outcomes(self, letter: DeadLetter) -> list[dict[str, Any]]:
        """Return the replays of a letter, each with the state of its job.

        The state is None if the record of the job was removed.
        """
        ids = [read_id(each.job) or b"" for each in letter.replays]
        jobs = await self._jobs.get_many(ids)
        return [each._asdict() | _outcome(job) for each, job in zip(letter.replays, jobs, strict=True)]

    async def _new(
        self, letter: DeadLetter, deployment: str, route: dict[str, Any], endpoints: Any, principal: str
    ) -> NewJob:
        request = envelope.read_request(memoryview(await self._letters.payload(letter)))
        data: list[Buffer] = request.data
        if self._claims.needed(sum(map(len, data))):
            data = [await self._claims.give(data, self._ttl_s + self._retention_s, durable=True)]
        now_ms = int(time.time() * 1e3)
        return job_of_letter(
            letter,
            request,
            data,
            id=new_id(now_ms, os.urandom(10)),
            route=route,
            deployment=deployment,
            endpoint=endpoint_of(endpoints, deployment, route["model"]),
            principal=principal,
            now_ms=now_ms,
            expires_ms=now_ms + int(self._ttl_s * 1e3),
        )

    async def _publish(self, new: NewJob) -> None:
        """Publish the job's message. After an error, the job sweeper publishes it from the record."""
        queue = jobs_queue(new.deployment, new.level)
        try:
            channel = await self._out.wait_up(CONNECT_S)
            await channel.declare(queue)
            body = envelope.pack(envelope.REQUESTS, [new.frame])
            await channel.publish(body, routing_key=queue.name, mandatory=True, persistent=True)
            await self._jobs.queued([new.id])
        except Unavailable as error:
            log.info(
                "a replay cannot be published yet; trying again",
                extra={"job": new.id.hex(), "problem": error.message},
            )


def _outcome(job: Job | None) -> dict[str, Any]:
    return {"status": None, "error": None} if job is None else {"status": job.status, "error": job.error}
