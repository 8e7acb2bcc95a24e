"""The connection to Valkey or Redis, and the error for a store that does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Self

from redis.asyncio import BlockingConnectionPool, Connection, Redis
from redis.connection import HiredisRespSerializer
from redis.exceptions import RedisError

from tidegate.kernel.errors import Unavailable

OPERATION_TIMEOUT_S = 2.0
CONNECTIONS = 32


class StoreUnavailable(Unavailable):
    """The store did not answer, so its content is unknown."""

    reason = "store_unavailable"


class PackingConnection(Connection):
    """A connection that encodes commands in C.

    One call of a script can have hundreds of arguments for many jobs. Encoding them in Python would be slow.
    """

    _packer = HiredisRespSerializer()

    def pack_command(self, *args: Any) -> list[bytes]:
        """Return a command as bytes for the server."""
        packed: list[bytes] = self._packer.pack(*args)
        return packed


def connect(url: str) -> Redis:
    """Return a client of the server at ``url``. It connects on first use.

    At most ``CONNECTIONS`` calls run at the same time. Further calls wait for a free connection. With TLS,
    the client cannot use :class:`PackingConnection`, so it encodes commands in Python.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        connection_class=PackingConnection,
        max_connections=CONNECTIONS,
        timeout=OPERATION_TIMEOUT_S,
        socket_timeout=OPERATION_TIMEOUT_S,
        socket_connect_timeout=OPERATION_TIMEOUT_S,
        protocol=2,
    )
    return Redis.from_pool(pool)


class Connected:
    """The base class of typed stores. Every failure raises :class:`StoreUnavailable`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    @classmethod
    def connect(cls, url: str) -> Self:
        """Return the store at ``url``. It connects on first use."""
        return cls(connect(url))

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


async def answer(operation: Awaitable[Any]) -> Any:  # Any, because the type hints of redis are not exact
    """Return the result of an operation. Every failure raises :class:`StoreUnavailable`."""
    task = asyncio.current_task()
    cancels = task.cancelling() if task is not None else 0
    try:
        found = await operation
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable(f"The store does not answer: {error or type(error).__name__}.") from error
    if task is not None and task.cancelling() > cancels:
        # On Python 3.11, the client's wait_for can ignore a cancellation and return the answer. So raise
        # CancelledError here.
        raise asyncio.CancelledError
    return found
