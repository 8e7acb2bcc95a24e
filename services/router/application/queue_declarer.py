"""Declare the queues of Deployments one by one, so that a failure delays no other Deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import Queue
from tidegate.kernel.errors import Unavailable

log = telemetry.logger(__name__)

# Seconds to wait before a failed declaration is tried again: the first wait and the longest wait. Each wait
# is twice as long as the one before.
RETRY_S = (1.0, 60.0)


@dataclass(frozen=True, slots=True)
class FailedDeclaration:
    """A failed declaration of a Deployment's queues. ``not_before``: the time of the next retry."""

    problem: str
    wait_s: float
    not_before: float


class QueueDeclarer:
    """The declared queues of Deployments, and the failed declarations, which are tried again."""

    def __init__(self) -> None:
        self._declared: set[str] = set()
        self._failed: dict[str, FailedDeclaration] = {}

    def forget(self) -> None:
        """Forget which queues are declared, because the broker may have lost them. Keep the retry times."""
        self._declared.clear()

    async def declare(self, queues: Mapping[str, Sequence[Queue]], connection: Connection) -> None:
        """Declare the queues that are not declared yet. Deployments that failed before come last."""
        deployments = set(queues)
        # Forget deleted Deployments. Then the queues of a new Deployment with the same name are declared
        # again.
        self._declared &= deployments
        self._failed = {name: each for name, each in self._failed.items() if name in deployments}
        channel, now = connection.channel, asyncio.get_running_loop().time()
        for name in sorted(deployments - self._declared, key=lambda name: (name in self._failed, name)):
            if channel is None:
                return
            failed = self._failed.get(name)
            if failed is not None and now < failed.not_before:
                continue
            try:
                for queue in queues[name]:
                    await channel.declare(queue)
            except Unavailable as error:
                self._postpone(name, error.message, now)
                return  # the broker closed the channel; the other queues are declared on the next channel
            except ValueError as error:
                self._postpone(name, str(error), now)
            else:
                self._declared.add(name)
                self._failed.pop(name, None)

    def _postpone(self, name: str, problem: str, now: float) -> None:
        before = self._failed.get(name)
        wait_s = min(before.wait_s * 2, RETRY_S[1]) if before is not None else RETRY_S[0]
        self._failed[name] = FailedDeclaration(problem, wait_s, now + wait_s)
        if before is None or before.problem != problem:
            log.warning(
                "the queues of a Deployment cannot be declared; trying again",
                extra={"deployment": name, "problem": problem},
            )
