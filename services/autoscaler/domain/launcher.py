"""What the autoscaler asks of a launcher, and what a launcher tells.

A launcher starts workers somewhere (processes, containers, pods). It decides nothing. The name of a
replica, ``<deployment>-<slot>-<generation>``, is the fence: a launcher refuses a name that exists.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

from tidegate.kernel.errors import Conflict, Unavailable
from tidegate.kernel.protocol.models import Assignment, Deployment, Resources, WarmAssignment, WarmPoolSpec

# What an engine's own `stop` grants a worker that waits, as it cannot be told later what its Deployment asks
# for; as long as it only waits it ends at once.
POOL_DRAIN_S = 600.0


class NameTaken(Conflict):
    """A replica of that name exists, alive or not yet cleared away."""


class LaunchFailed(Unavailable):
    """The worker could not even be started; the message says why."""


@dataclass(frozen=True, slots=True)
class Running:
    """A replica that exists at the launcher; ``alive`` False: its worker is gone, its remains are not.

    ``pid`` 0: not known (yet). Times are seconds since the epoch. ``fingerprint`` is that of the
    Deployment it was launched with. ``ending`` tells how a dead one ended, as far as that is known;
    ``out_of_memory``: the kernel ended it, as it had reached its limit. ``image`` is what a container runs,
    with its digest, ``gpus`` the UUIDs of those it holds. ``worker`` is the name by which the launcher knows
    it, if that is another: it waited in a warm pool. ``memory_mb`` is what its processes take; 0: not known.
    """

    replica: str
    deployment: str
    slot: int
    generation: int
    pid: int
    alive: bool
    launched_at: float
    fingerprint: str = ""
    drain_limit_s: float = 60.0
    draining_since: float | None = None
    ending: str = ""
    out_of_memory: bool = False
    image: str = ""
    gpus: tuple[str, ...] = ()
    worker: str = ""
    memory_mb: int = 0


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """What a launcher reads of an assignment; the worker is handed the ``document``."""

    replica: str
    launched_at: float
    drain_limit_s: float
    fingerprint: str
    image: str | None
    resources: Resources
    document: str

    @classmethod
    def of(cls, given: Assignment | WarmAssignment) -> LaunchSpec:
        """The start of a replica, or of a worker that waits to become one."""
        if isinstance(given, WarmAssignment):
            pool = given.pool
            drain_limit_s, read, image = POOL_DRAIN_S, pool_fingerprint(pool), pool.image
            resources = pool.resources
        else:
            wanted = given.deployment
            drain_limit_s, read = wanted.drain_limit_s, fingerprint(wanted)
            image, resources = wanted.image, wanted.resources
        document = given.model_dump_json()
        return cls(given.replica, given.launched_at, drain_limit_s, read, image, resources, document)


class Launcher(Protocol):
    """Starts and ends workers. Every method may raise ``Unavailable``: then nothing is known."""

    async def launch(self, assignment: Assignment | WarmAssignment) -> None:
        """Start a worker. Raises :class:`NameTaken` or :class:`LaunchFailed`."""

    async def drain(self, replica: str) -> None:
        """Ask the worker to finish what it holds and exit; returns at once. Unknown names are ignored."""

    async def kill(self, replica: str) -> None:
        """End the worker with everything it started, and clear its remains. Idempotent."""

    async def list(self) -> list[Running]:
        """Every replica that exists, the dead whose remains are not cleared included."""

    async def output(self, replica: str, lines: int) -> str:
        """Return the end of a replica's output; empty if the folder of logs has it."""


def replica_name(deployment: str, slot: int, generation: int) -> str:
    """The name of a replica."""
    return f"{deployment}-{slot}-{generation}"


def deployment_of_pool(flavour: str) -> str:
    """The pool in place of the Deployment in its workers' names; no Deployment has a - at the end."""
    return f"warm-{flavour}-"


def pool_of(pool: str) -> str | None:
    """The flavour that :func:`deployment_of_pool` has in it; None: that is the name of a Deployment."""
    return pool[5:-1] if pool.startswith("warm-") and pool.endswith("-") else None


def parse_replica(replica: str) -> tuple[str, int, int] | None:
    """Deployment, slot and generation of a replica's name; None when it is not one."""
    parts = replica.rsplit("-", 2)
    if len(parts) != 3 or not parts[0] or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    return parts[0], int(parts[1]), int(parts[2])


def fingerprint(deployment: Deployment) -> str:
    """Digest of what a worker reads at its start: another value asks for another worker."""
    read = {"model", "version", "env", "threads", "instances", "batching", "resources", "image"}
    if deployment.progress_timeout_s is not None:  # else as before there was this field
        read.add("progress_timeout_s")
    return _digest(deployment.model_dump(mode="json", include=read))


def pool_fingerprint(flavour: WarmPoolSpec) -> str:
    """Digest of what a worker of a warm pool is started with."""
    return _digest(flavour.model_dump(mode="json", exclude={"workers"}))


def _digest(start: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(start, sort_keys=True).encode()).hexdigest()[:16]
