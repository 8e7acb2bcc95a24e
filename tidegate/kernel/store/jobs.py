"""The durable store of jobs.

A confirmed change is on disk, because the server runs with ``appendfsync always``.

Every change of a job's state is a call of a Lua script (``lua/``) with a compare-and-set for each job. So the
first final state of a job cannot change. If a call is repeated because its answer was lost, the second call
changes nothing. Concurrent calls of the same script are grouped into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, TypeAlias

from redis.asyncio import Redis

from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.jobs import (
    ID_SIZE,
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
from tidegate.kernel.store.transitions import JobLease, JobWait, Transitions
from tidegate.kernel.store.watch import JobWatch

PREFIX = "tidegate:job:"
RECORD, REQUEST, REPLY = f"{PREFIX}r:", f"{PREFIX}request:", f"{PREFIX}reply:"
LOG, CHANGED, ACKNOWLEDGED = f"{PREFIX}log:", f"{PREFIX}changed:", f"{PREFIX}acknowledged"
IDEMPOTENCY = f"{PREFIX}idem:"
WAITING = f"{PREFIX}waiting:"

# Inside a class with a method `list`, the name `list` means that method and not the builtin type. So these
# types are defined outside of the class.
Jobs: TypeAlias = list[Job]
MaybeJobs: TypeAlias = list[Job | None]
Events: TypeAlias = list[JobEvent]
Ends: TypeAlias = list[bool]
AllTaken: TypeAlias = list[Taken]


class JobStore:
    """Typed access to the jobs. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis, url: str) -> None:
        self._redis = redis
        self._url = url
        self._scripts = Scripts(redis)
        self._transitions = Transitions(self._scripts)
        self._watch: JobWatch | None = None

    @classmethod
    def connect(cls, url: str) -> Self:
        """Return the store at ``url``. It connects on first use."""
        return cls(connect(url), url)

    async def close(self) -> None:
        """Close the connections after all calls have their answers."""
        await self._transitions.stop()
        if self._watch is not None:
            await self._watch.close()
        await self._redis.aclose()

    async def ping(self) -> None:
        """Wait until the store answers."""
        await answer(self._redis.ping())

    # --- transitions -----------------------------------------------------------------------------------

    async def accept(self, new: NewJob) -> Accepted:
        """Record a new job in the state ``accepting``. Return its id, and True because it is new.

        If the idempotency key was used with the same body, return the existing job's id and False. Raises
        :class:`Conflict` if the key was used with another body.
        """
        found = await self._transitions.accept.do(records.to_accept(new))
        if found[:1] == b"c":
            raise Conflict("The Idempotency-Key was used before, with another request.")
        return Accepted(found[1:], False) if found[:1] == b"k" else Accepted(new.id, True)

    async def queued(self, ids: Sequence[bytes]) -> None:
        """Record that the broker confirmed these jobs' messages. Jobs in a later state do not change."""
        await self._transitions.queued.do_all(ids)

    async def take(self, claims: Sequence[Take]) -> AllTaken:
        """Decide for each of ``claims`` whether its worker may run its job now. Record each decision.

        A claim is a worker's request to run a job. Return a :class:`Taken` for each claim, in order.
        """
        return await self._transitions.take.do_all(claims)

    async def finish(self, ends: Sequence[Finish]) -> Ends:
        """Record how attempts ended. Return True for each attempt whose result the job accepts.

        False means that the job has already ended in another way, or that a later attempt runs it.
        """
        return await self._transitions.finish.do_all([records.to_finish(end) for end in ends])

    async def lease(self, id: bytes, attempt: int, worker: str, until_ms: int) -> bool:
        """Lease a job to ``worker`` until ``until_ms`` (milliseconds since the epoch).

        Until then, only this worker may run the job, even after the job's message is acked. If ``until_ms``
        is in the past, the lease ends. ``attempt``: the attempt in the job's record, or 0 if no worker has
        taken the job.

        Return False if the job has ended, or if another attempt or another worker has the job. In that case,
        ``worker`` must stop working on the job.
        """
        return await self._transitions.lease.do(JobLease(id, attempt, worker, until_ms))

    async def waits(self, waits: Sequence[JobWait]) -> Ends:
        """Record that running jobs wait for their upstream or engine, or that their wait has ended.

        If a worker is lost while its job waits, the lost attempt is not counted. Return False for each job
        that has ended, or that runs in another attempt.
        """
        return await self._transitions.waits.do_all(waits)

    async def cancel(self, id: bytes) -> Job | None:
        """Cancel a job that has not ended. Return the job's record, or None if the job does not exist."""
        return records.job(id, await self._scripts.run("cancel", [id]))

    # --- reading ---------------------------------------------------------------------------------------

    async def get(self, id: bytes) -> Job | None:
        """Return a job, or None if it does not exist or was removed."""
        return records.job(id, await answer(self._redis.hgetall(RECORD.encode() + id)))

    async def get_many(self, ids: Sequence[bytes]) -> MaybeJobs:
        """Return several jobs, in order; None for each job that does not exist."""
        if not ids:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for id_ in ids:
            pipe.hgetall(RECORD.encode() + id_)
        found = await answer(pipe.execute())
        return [records.job(id_, fields) for id_, fields in zip(ids, found, strict=True)]

    async def of_key(self, principal: str, key: str) -> Job | None:
        """Return the job that a principal submitted with this idempotency key, or None."""
        digest = records.key_digest(principal, key)
        found: bytes | None = await answer(self._redis.get(IDEMPOTENCY.encode() + digest))
        return None if found is None else await self.get(found[:ID_SIZE])

    async def result(self, id: bytes) -> bytes | None:
        """Return a job's reply frame, or None if it has none."""
        found: bytes | None = await answer(self._redis.get(REPLY.encode() + id))
        return found

    async def request(self, id: bytes) -> bytes | None:
        """Return a job's request frame, or None if it was deleted.

        The frame of a failed job is kept until the job is removed. The frame of any other job is deleted when
        the job ends.
        """
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
        """Return up to ``limit`` jobs that match all filters and are older than ``before`` (an id).

        The newest comes first. The state ``queued`` does not include ``accepting``.
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
        """Return the events of a job that come after event number ``after``."""
        lines = await answer(self._redis.lrange(LOG.encode() + id, after, -1))
        return [records.event(after + n, line) for n, line in enumerate(lines, 1)]

    def watch(self) -> JobWatch:
        """Return the object that reports changes of jobs.

        All its users in this process share one connection.
        """
        if self._watch is None:
            self._watch = JobWatch(self._url, CHANGED.encode())
        return self._watch

    async def counts(self) -> Counts:
        """Return the counts of jobs by state and by Deployment, and the counts of the ledger's events.

        All numbers are from the same moment, so they can be compared.
        """
        states, deployments, ledger, acknowledged, watched = await self._scripts.run("counts", [])
        return Counts(
            states=dict(zip(STATES, states, strict=True)),
            deployments={name.decode(): JobLoad(waiting, running) for name, waiting, running in deployments},
            ledger=records.totals(ledger),
            acknowledged=records.totals(acknowledged),
            watched=watched,
        )

    async def acknowledged(self, incarnation: str, total: int) -> None:
        """Record how many 202 answers a gateway process has sent."""
        await answer(self._redis.hset(ACKNOWLEDGED, incarnation, str(total)))

    async def position(self, job: Job) -> int:
        """Estimate how many jobs will run before this one; 0 if this job does not wait."""
        line = f"{WAITING}{job.deployment}:"
        pipe = self._redis.pipeline(transaction=False)
        pipe.zrank(line + job.level, job.id)
        for level in LEVELS:
            pipe.zcard(line + level)
        rank, *waiting = await answer(pipe.execute())
        return 0 if rank is None else ahead(rank, job.level, dict(zip(LEVELS, waiting, strict=True)))

    # --- maintenance -----------------------------------------------------------------------------------

    async def stale(self, now_ms: int, limit: int) -> Jobs:
        """Return up to ``limit`` jobs whose messages are probably lost.

        A message is probably lost in two cases: the broker has not confirmed it within 10 s, or the job's
        lease has expired.

        The calling code must call this every few seconds. After a pause of more than 10 s between two calls,
        jobs with expired leases are left out for 15 s. The store may have been down during the pause, so that
        workers could not renew these leases.
        """
        ids = await self._scripts.run("stale", [now_ms, limit])
        return [job for job in await self.get_many(ids) if job is not None and not job.terminal]

    async def revive(self, deployment: str, before_ms: int, *, orphans: bool) -> int:
        """Mark messages of a Deployment's waiting jobs as lost, so that :meth:`stale` returns the jobs.

        Only jobs that were created before ``before_ms`` (milliseconds since the epoch) are chosen.
        ``orphans``: if True, also choose running jobs without a lease. Return the number of chosen jobs. One
        call chooses only some thousands of jobs.
        """
        before = before_ms.to_bytes(6, "big")
        found: int = await self._scripts.run("revive", [deployment, before, int(orphans)])
        return found

    async def claim_republish(self, id: bytes, attempt: int, state: State) -> bytes | None:
        """Reserve the right to publish a job's message again. Return the request frame for this message.

        For the next 10 s, :meth:`stale` does not return the job. The calling code must call :meth:`queued`
        after the publisher confirm.

        Return None if the job has changed, if another router publishes its message, or if the request was
        deleted. Also return None if the job may not be retried. In this case, the job is now ``failed``.
        """
        frame: bytes | None = await self._scripts.run("republish", [id, attempt, state])
        return frame

    async def expire(self, now_ms: int, limit: int) -> Jobs:
        """Expire up to ``limit`` jobs whose deadlines have passed. Return these jobs."""
        ids = await self._scripts.run("expire", [now_ms, limit])
        return [job for job in await self.get_many(ids) if job is not None]

    async def size(self) -> tuple[int, int, int]:
        """Return the server's used memory in bytes, the number of jobs, and how many of them have ended."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.info("memory")
        pipe.zcard(f"{PREFIX}all")
        pipe.zcard(f"{PREFIX}finished")
        memory, records_, over = await answer(pipe.execute())
        return int(memory["used_memory"]), records_, over

    async def retire(self, now_ms: int, keep_ms: int, keep_count: int, limit: int) -> int:
        """Remove jobs that ended more than ``keep_ms`` ago. Return the number of removed jobs.

        If more than ``keep_count`` ended jobs exist, also remove the jobs that ended first. One call removes
        at most ``limit`` jobs.
        """
        removed: int = await self._scripts.run("retire", [now_ms - keep_ms, keep_count, limit])
        return removed
