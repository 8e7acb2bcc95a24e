"""Remember which replicas have read which prompts, and choose a replica for each request.

Each gateway process remembers only its own requests. For a new prompt, all processes choose the same replica.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, Self

from prometheus_client import Counter

from services.gateway.domain.prompt_blocks import prompt_blocks
from services.gateway.domain.replica_choice import Choice, Outcome, PrefixMemory, ReplicaSlots, choose

PREFIXES = Counter(
    "tidegate_gateway_llm_prefix_total",
    "Requests to language models. hit: ran on the replica that had read the prompt's beginning; first: no "
    "replica had read the beginning; stolen: another replica was free sooner; loaded: the preferred replica "
    "had too much load; none: no replica was preferred.",
    ["outcome"],
)


class DeploymentMemory:
    """The prompts that the replicas of a Deployment have read, and the load of each replica.

    ``inflight``: the number of this gateway's requests in flight, by replica.
    """

    def __init__(self) -> None:
        self.prefixes = PrefixMemory()
        self.inflight = collections.Counter[str]()


class Placement:
    """The choice of a replica for one request.

    ``replica``: the preferred replica; None means any. This class is a context manager, and the request must
    run inside its ``with`` block. Until the block ends, the request counts as load of the replica that runs
    it.
    """

    def __init__(self, memory: DeploymentMemory, blocks: list[bytes], choice: Choice) -> None:
        self._memory = memory
        self._blocks = blocks
        self._outcome: Outcome = choice.outcome
        self._counted: str | None = None
        self._taken = False
        self.replica = choice.replica
        self._count(choice.replica)

    def taken_by(self, replica: str | None) -> None:
        """Record which replica runs the request.

        The first answer contains the name of this replica. Only the first call with a name has an effect.
        """
        if self._taken or not replica:
            return
        self._taken = True
        if self.replica is not None and replica != self.replica:
            self._outcome = "stolen"
        PREFIXES.labels(self._outcome).inc()
        self._count(replica)
        self._memory.prefixes.read_by(self._blocks, replica)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting the request as load of its replica."""
        self._count(None)
        self._taken = True

    def _count(self, replica: str | None) -> None:
        inflight = self._memory.inflight
        if self._counted is not None:
            inflight[self._counted] -= 1
            if not inflight[self._counted]:
                del inflight[self._counted]
        self._counted = replica
        if replica is not None:
            inflight[replica] += 1


class PrefixAffinity:
    """Chooses replicas. ``replicas`` returns the ready replicas of a Deployment."""

    def __init__(self, replicas: Callable[[str], Sequence[ReplicaSlots]]) -> None:
        self._replicas = replicas
        self._memories: dict[str, DeploymentMemory] = {}

    def place(
        self, deployment: str, wait_ms: float, path: str, body: dict[str, Any], salt: bytes
    ) -> Placement:
        """Return the placement of a request.

        No replica is preferred if ``wait_ms`` is 0, or if fewer than two replicas are ready.
        """
        memory = self._memories.get(deployment)
        if memory is None:
            memory = self._memories[deployment] = DeploymentMemory()
        ready = self._replicas(deployment)
        if not wait_ms or len(ready) < 2:
            return Placement(memory, [], Choice(None, "none"))
        blocks = prompt_blocks(path, body, salt)
        return Placement(memory, blocks, choose(blocks, memory.prefixes, ready, memory.inflight))
