"""The durable home of jobs. Whatever it answers is on disk: its server runs with ``appendfsync always``.

Every transition is one Lua call (``lua/``), a compare-and-set for each job in it, so the first terminal state
wins whoever asks, and asking again, because an answer was lost, changes nothing. Calls of the same kind that
are made at the same time travel together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, TypeAlias

from redis.asyncio import Redis

from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.jobs import (
    LEVELS,
    STATES,
    Accepted,
    Counts,
    Finish,
    Job,
    JobEvent,
    JobLoad,
    NewJob,
    State,
    Take,
    Taken,
    ahead,
)
from tidegate.kernel.store import records
from tidegate.kernel.store.connection import answer, connect
from tidegate.kernel.store.scripts import Scripts
from tidegate.kernel.store.transitions import Lease, Transitions
from tidegate.kernel.store.watch import Watch

PREFIX = "tidegate:job:"
RECORD, REQUEST, REPLY = f"{PREFIX}r:", f"{PREFIX}request:", f"{PREFIX}reply:"
LOG, CHANGED, ACKNOWLEDGED = f"{PREFIX}log:", f"{PREFIX}changed:", f"{PREFIX}acknowledged"
WAITING = f"{PREFIX}waiting:"

# Inside of the class `list` is its method.
Jobs: TypeAlias = list[Job]
MaybeJobs: TypeAlias = list[Job | None]
Events: TypeAlias = list[JobEvent]
Ends: TypeAlias = list[bool]
AllTaken: TypeAlias = list[Taken]


class JobStore:
    """Typed access to the jobs; every failure is a ``StoreUnavailable``."""

    def __init__(self, redis: Redis, url: str) -> None:
        self._redis = redis
        self._url = url
        self._scripts = Scripts(redis)
        self._transitions = Transitions(self._scripts)
        self._watch: Watch | None = None

    @classmethod
    def connect(cls, url: str) -> Self:
        """A store on ``url``; connects on first use."""
        return cls(connect(url), url)

    async def close(self) -> None:
        """Close the connections, once what was asked for is answered."""
        await self._transitions.stop()
        if self._watch is not None:
            await self._watch.close()
        await self._redis.aclose()

    async def ping(self) -> None:
        """Return when the store answers."""
        await answer(self._redis.ping())

    # --- the way of a job ------------------------------------------------------------------------------

    async def accept(self, new: NewJob) -> Accepted:
        """Record a job as ``accepting``. Raises :class:`Conflict` when its idempotency key is known with
        another body; with the same body it gives the job of then.
        """
        found = await self._transitions.accept.do(records.to_accept(new))
        if found[:1] == b"c":
            raise Conflict("The Idempotency-Key was used before, with another request.")
        return Accepted(found[1:], False) if found[:1] == b"k" else Accepted(new.id, True)

    async def queued(self, ids: Sequence[bytes]) -> None:
        """The broker has confirmed the messages of these jobs; jobs that have moved on stay as they are."""
        await self._transitions.queued.do_all(ids)

    async def take(self, claims: Sequence[Take]) -> AllTaken:
        """Workers run jobs now: which of them, and as which attempt."""
        return await self._transitions.take.do_all(claims)

    async def finish(self, ends: Sequence[Finish]) -> Ends:
        """Record how attempts ended. False: that job was not that attempt's any more; drop its result."""
        return await self._transitions.finish.do_all([records.to_finish(end) for end in ends])

    async def lease(self, id: bytes, attempt: int, worker: str, until_ms: int) -> bool:
        """Keep a job without its message until ``until_ms`` (since the epoch; now: give it up).

        ``attempt`` 0: it waits at the worker. False: it is over, or somebody else's; let it go.
        """
        return await self._transitions.lease.do(Lease(id, attempt, worker, until_ms))

    async def cancel(self, id: bytes) -> Job | None:
        """Cancel a job unless it is over; gives it as it is then, None when there is none."""
        return records.job(id, await self._scripts.run("cancel", [id]))

    # --- reading ---------------------------------------------------------------------------------------

    async def get(self, id: bytes) -> Job | None:
        """A job; None when there is none (any more)."""
        return records.job(id, await answer(self._redis.hgetall(RECORD.encode() + id)))

    async def get_many(self, ids: Sequence[bytes]) -> MaybeJobs:
        """Several jobs, in order."""
        if not ids:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for id_ in ids:
            pipe.hgetall(RECORD.encode() + id_)
        found = await answer(pipe.execute())
        return [records.job(id_, fields) for id_, fields in zip(ids, found, strict=True)]

    async def result(self, id: bytes) -> bytes | None:
        """A job's reply frame; None when it has none."""
        found: bytes | None = await answer(self._redis.get(REPLY.encode() + id))
        return found

    async def request(self, id: bytes) -> bytes | None:
        """A job's request frame; kept until it is over, and of one that failed until it is removed."""
        found: bytes | None = await answer(self._redis.get(REQUEST.encode() + id))
        return found

    async def list(
        self,
        *,
        state: State | None = None,
        deployment: str | None = None,
        endpoint: str | None = None,
        principal: str | None = None,
        batch: str | None = None,
        before: bytes | None = None,
        limit: int = 100,
    ) -> Jobs:
        """Jobs that fit all that is given, newest first, older than ``before`` (an id), up to ``limit``.

        ``state``: ``queued`` does not include ``accepting``.
        """
        given = {
            "state": state,
            "deployment": deployment,
            "endpoint": endpoint,
            "principal": principal,
            "batch": batch,
        }
        wanted = [text for name, value in given.items() if value is not None for text in (name, value)]
        jobs: Jobs = []
        cursor = before or b""
        while len(jobs) < limit:
            cursor, *ids = await self._scripts.run("list", [cursor, limit - len(jobs), *wanted])
            jobs += [job for job in await self.get_many(ids) if job is not None]
            if not cursor:
                break
        return jobs

    async def log(self, id: bytes, after: int = 0) -> Events:
        """What has happened to a job, from the event behind number ``after`` on."""
        lines = await answer(self._redis.lrange(LOG.encode() + id, after, -1))
        return [records.event(after + n, line) for n, line in enumerate(lines, 1)]

    def watch(self) -> Watch:
        """Notices of changes, over one connection for all that this process watches."""
        if self._watch is None:
            self._watch = Watch(self._url, CHANGED.encode())
        return self._watch

    async def counts(self) -> Counts:
        """All records counted, at one moment."""
        states, deployments, ledger, acknowledged, watched = await self._scripts.run("counts", [])
        return Counts(
            states=dict(zip(STATES, states, strict=True)),
            deployments={name.decode(): JobLoad(waiting, running) for name, waiting, running in deployments},
            ledger=records.totals(ledger),
            acknowledged=records.totals(acknowledged),
            watched=watched,
        )

    async def acknowledged(self, incarnation: str, total: int) -> None:
        """A gateway process says how many 202s it has given."""
        await answer(self._redis.hset(ACKNOWLEDGED, incarnation, str(total)))

    async def position(self, job: Job) -> int:
        """About how many jobs will be taken before this one; 0 when it does not wait."""
        line = f"{WAITING}{job.deployment}:"
        pipe = self._redis.pipeline(transaction=False)
        pipe.zrank(line + job.level, job.id)
        for level in LEVELS:
            pipe.zcard(line + level)
        rank, *waiting = await answer(pipe.execute())
        return 0 if rank is None else ahead(rank, job.level, dict(zip(LEVELS, waiting, strict=True)))

    # --- looking after jobs ----------------------------------------------------------------------------

    async def stale(self, now_ms: int, limit: int) -> Jobs:
        """Jobs whose message nobody has, it seems: not confirmed for 10 s, or with a lease that lapsed.

        Call it every few seconds: after a gap, in which this store may have been away, leases count as good
        for a while.
        """
        ids = await self._scripts.run("stale", [now_ms, limit])
        return [job for job in await self.get_many(ids) if job is not None and not job.terminal]

    async def revive(self, deployment: str, before_ms: int, *, orphans: bool) -> int:
        """The messages of a Deployment's jobs are lost: let :meth:`stale` name those that were made before
        ``before_ms`` and wait, with ``orphans`` also those that run. Gives how many; up to some thousands.
        """
        before = before_ms.to_bytes(6, "big")
        found: int = await self._scripts.run("revive", [deployment, before, int(orphans)])
        return found

    async def claim_republish(self, id: bytes, attempt: int, state: State) -> bytes | None:
        """The request frame to publish again, as the record's attempt; its next look is then 10 s ahead.

        None: it has moved on, somebody else is at it, or it may not be tried again (it has failed then). Once
        the broker has confirmed, call :meth:`queued`.
        """
        frame: bytes | None = await self._scripts.run("republish", [id, attempt, state])
        return frame

    async def expire(self, now_ms: int, limit: int) -> Jobs:
        """End jobs whose time is over; gives them."""
        ids = await self._scripts.run("expire", [now_ms, limit])
        return [job for job in await self.get_many(ids) if job is not None]

    async def size(self) -> tuple[int, int, int]:
        """Return the bytes of memory that the server uses, the records, and how many of them are over."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.info("memory")
        pipe.zcard(f"{PREFIX}all")
        pipe.zcard(f"{PREFIX}finished")
        memory, records_, over = await answer(pipe.execute())
        return int(memory["used_memory"]), records_, over

    async def retire(self, now_ms: int, keep_ms: int, keep_count: int, limit: int) -> int:
        """Remove jobs that have been over for longer than ``keep_ms``, and the oldest of more than
        ``keep_count``; up to ``limit``, gives how many.
        """
        removed: int = await self._scripts.run("retire", [now_ms - keep_ms, keep_count, limit])
        return removed
