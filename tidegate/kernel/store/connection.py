"""The connection to Valkey or Redis, and what it means that it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Self

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from tidegate.kernel.errors import Unavailable

OPERATION_TIMEOUT_S = 2.0
CONNECTIONS = 32


class StoreUnavailable(Unavailable):
    """The store did not answer; what it would have said is unknown."""

    reason = "store_unavailable"


def connect(url: str) -> Redis:
    """A client of the server at ``url``; connects on first use.

    Beyond ``CONNECTIONS`` calls at once wait for one before them; they do not fail.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=OPERATION_TIMEOUT_S,
        socket_timeout=OPERATION_TIMEOUT_S,
        socket_connect_timeout=OPERATION_TIMEOUT_S,
        protocol=2,
    )
    return Redis.from_pool(pool)


class Connected:
    """Typed access to a part of what is on a server; every failure is a :class:`StoreUnavailable`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    @classmethod
    def connect(cls, url: str) -> Self:
        """The store on ``url``; connects on first use."""
        return cls(connect(url))

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


async def answer(operation: Awaitable[Any]) -> Any:  # redis types its answers too loosely to carry on
    """What an operation gives; every failure is a :class:`StoreUnavailable`."""
    task = asyncio.current_task()
    asked = task.cancelling() if task is not None else 0
    try:
        found = await operation
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable(f"The store does not answer: {error or type(error).__name__}.") from error
    if task is not None and task.cancelling() > asked:
        # The client's wait_for (Python 3.11) gave the answer and swallowed a cancellation with it.
        raise asyncio.CancelledError
    return found
