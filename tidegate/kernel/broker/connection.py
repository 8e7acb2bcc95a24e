"""Connections to RabbitMQ that reconnect. Services reach the broker only through them.

A :class:`Connection` is one connection with one channel. Its owner's ``setup`` declares queues and starts
consumers. ``setup`` runs again after every reconnect. It also runs again if the broker cancels a consumer
because its queue was deleted. So no consumer disappears unnoticed.

Two drivers implement the channel (``tidegate.kernel.broker.channel``): Tidegate's own fast one for requests,
replies and jobs, and aio-pika for all other connections (docs/adr/002-own-amqp-session.md).

A service must use one connection to publish and another one to consume. During a memory alarm, RabbitMQ
blocks each connection that publishes. Acks on such a connection are blocked too. There is one exception. If a
message must arrive before an ack, the service publishes this message on the connection that consumes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Literal, Self

from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.channel import Channel, Delivery, DriverChannel, OnDelivery, Refused, Unroutable
from tidegate.kernel.errors import Unavailable

__all__ = ["Channel", "Connection", "Delivery", "OnDelivery", "Refused", "Unroutable", "use_driver"]

log = telemetry.logger(__name__)

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
HEARTBEAT_S = 20
BACKOFF_S = (0.05, 2.0)

Driver = Literal["auto", "aio-pika"]
Setup = Callable[[Channel], Awaitable[None]]

_driver: Driver = "auto"


def use_driver(driver: Driver) -> None:
    """Choose the AMQP driver of this process's new connections.

    ``auto``: connections whose ``fast`` is True use the fast driver, and all others use aio-pika.
    ``aio-pika``: all connections use aio-pika.
    """
    global _driver
    _driver = driver


class Connection:
    """A connection that reconnects. ``channel`` is None while it is not connected.

    ``fast``: True if the connection carries requests, replies or jobs. Then it uses the fast driver, unless
    :func:`use_driver` has chosen aio-pika.
    """

    def __init__(
        self,
        url: str,
        name: str,
        setup: Setup,
        on_down: Callable[[], None] | None = None,
        *,
        on_up: Callable[[], None] | None = None,
        confirms: bool = True,
        fast: bool = False,
    ) -> None:
        self._url = url
        self._name = name
        self._setup = setup
        self._on_down = on_down
        self._on_up = on_up
        self._confirms = confirms
        self._fast = fast
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.channel: Channel | None = None
        self.problem: str | None = "RabbitMQ is not connected yet."

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self) -> None:
        """Begin to connect, in the background. A second call has no effect."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"broker connection {self._name}")

    async def stop(self) -> None:
        """Send all written bytes, and close. Unacked messages return to their queues."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CLOSE_TIMEOUT_S)
        await tasks.end(self._task)
        self._task = None

    async def wait_up(self, timeout_s: float) -> Channel:
        """Return the channel as soon as it is connected. Raises ``Unavailable`` after ``timeout_s``."""
        channel = self.channel
        while channel is None:
            try:
                await asyncio.wait_for(self._up.wait(), timeout_s)
            except TimeoutError:
                raise Unavailable(self.problem or "RabbitMQ does not answer.") from None
            channel = self.channel
        return channel

    async def _run(self) -> None:
        delay = BACKOFF_S[0]
        while True:
            try:
                await self._use_one_channel()
                delay = BACKOFF_S[0]
            except TimeoutError:
                self._note("RabbitMQ did not answer in time.")
            except (Unavailable, OSError) as error:
                problem = str(error) or type(error).__name__
                self._note(problem if problem.startswith("RabbitMQ") else f"RabbitMQ: {problem}")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, BACKOFF_S[1])

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("broker link is down", extra={"link": self._name, "problem": problem})
        self.problem = problem

    async def _use_one_channel(self) -> None:
        """Connect and run ``setup``. Return when the channel has ended."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            channel = await self._open()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._setup(channel)
            self.channel, self.problem = channel, None
            self._up.set()
            if self._on_up is not None:
                self._on_up()
            self._note(f"RabbitMQ: {await asyncio.shield(channel.ended)}")
        finally:
            if self.channel is not None:
                self.channel = None
                self._up.clear()
                if self._on_down is not None:
                    self._on_down()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await channel.close()
            finally:  # end the socket even if channel.close() is cancelled
                channel.abort("closed")

    async def _open(self) -> DriverChannel:
        # Import each driver on first use. Workers do not need aio-pika, and importing it would slow down
        # their start.
        if self._fast and _driver == "auto":
            from tidegate.kernel.broker.amqp.channel import open_channel as open_fast_channel

            return await open_fast_channel(
                self._url, name=self._name, heartbeat_s=HEARTBEAT_S, confirms=self._confirms
            )
        from tidegate.kernel.broker.aio_pika_channel import open_channel

        return await open_channel(
            self._url, name=self._name, heartbeat_s=HEARTBEAT_S, confirms=self._confirms
        )
