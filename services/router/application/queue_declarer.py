"""The queues of Deployments: each is declared on its own, so that one that fails holds up no other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import requests_queue, suspects_queue
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

# How long a Deployment whose queues were refused waits for the next try: the first time, and at most.
RETRY_S = (1.0, 60.0)


@dataclass(frozen=True, slots=True)
class FailedDeclaration:
    """A Deployment whose queues could not be declared, and when they are tried again (the loop's clock)."""

    problem: str
    wait_s: float
    not_before: float


class QueueDeclarer:
    """Declares what Deployments need. The broker closes a channel on a declaration that it refuses."""

    def __init__(self) -> None:
        self._declared: set[str] = set()
        self._refused: dict[str, FailedDeclaration] = {}

    def forget(self) -> None:
        """Declare everything again: the broker may have lost it. What was refused keeps its place."""
        self._declared.clear()

    async def declare(self, deployments: set[str], connection: Connection) -> None:
        """Declare the queues that are missing, those that were refused last."""
        # A Deployment that comes back under its old name needs its queue again.
        self._declared &= deployments
        self._refused = {name: found for name, found in self._refused.items() if name in deployments}
        channel, now = connection.channel, asyncio.get_running_loop().time()
        for name in sorted(deployments - self._declared, key=lambda name: (name in self._refused, name)):
            if channel is None:
                return
            refused = self._refused.get(name)
            if refused is not None and now < refused.not_before:
                continue
            try:
                await channel.declare(requests_queue(name))
                await channel.declare(suspects_queue(requests_queue(name)))
            except Unavailable as error:
                self._refuse(name, error.message, now)
                return  # the channel has ended: the rest is declared in the next one
            except ValueError as error:
                self._refuse(name, str(error), now)
            else:
                self._declared.add(name)
                self._refused.pop(name, None)

    def _refuse(self, name: str, problem: str, now: float) -> None:
        before = self._refused.get(name)
        wait_s = min(before.wait_s * 2, RETRY_S[1]) if before is not None else RETRY_S[0]
        self._refused[name] = FailedDeclaration(problem, wait_s, now + wait_s)
        if before is None or before.problem != problem:
            log.warning(
                "the queues of a Deployment cannot be declared; they are tried again",
                extra={"deployment": name, "problem": problem},
            )
