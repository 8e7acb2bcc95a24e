"""The jobs whose answers must still be written to the store of asynchronous inference.

tidegate:async:due   sorted set of jobs; the score is the time (ms) at which a gateway looks at the job next

The set is in the store of jobs, where a write returns only when it is on disk. A gateway that takes a job
sets the job's time to the end of the lease. If the gateway dies, another one takes the job after that time.
Then an answer may be written twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from tidegate.kernel.store.connection import Connected, answer

DUE = "tidegate:async:due"

_TAKE = """
local found = redis.call('ZRANGE', KEYS[1], '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])
for _, id in ipairs(found) do
  redis.call('ZADD', KEYS[1], ARGV[3], id)
end
return found
"""


class AsyncOutputStore(Connected):
    """Typed access to the set of jobs. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._take: Any = redis.register_script(_TAKE)

    async def add(self, job: bytes, due_ms: int) -> None:
        """Add a job. The job is on disk when this returns."""
        await answer(self._redis.zadd(DUE, {job: due_ms}))

    async def take(self, most: int, lease_ms: int) -> list[bytes]:
        """Lease at most ``most`` due jobs for ``lease_ms``, and return their ids."""
        now = int(time.time() * 1e3)
        found: list[bytes] = await answer(self._take(keys=[DUE], args=[now, most, now + lease_ms]))
        return found

    async def settle(self, done: Sequence[bytes], again: Mapping[bytes, int]) -> None:
        """Remove the jobs in ``done``, and set the times of the jobs in ``again``.

        ``again``: for each job, the Unix time (ms) at which a gateway looks at the job next.
        """
        pipe = self._redis.pipeline(transaction=True)
        if done:
            pipe.zrem(DUE, *done)
        if again:
            pipe.zadd(DUE, dict(again), xx=True)
        await answer(pipe.execute())
