"""What the autoscaler asks of a launcher, and what a launcher tells.

A launcher starts workers somewhere (processes, containers, pods). It decides nothing. The name of a
replica, ``<deployment>-<slot>-<generation>``, is the fence: a launcher refuses a name that exists.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

from tidegate.errors import Conflict, Unavailable
from tidegate.protocol.models import Assignment, Deployment


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
    with its digest, ``gpus`` the UUIDs of those it holds.
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


class Launcher(Protocol):
    """Starts and ends workers. Every method may raise ``Unavailable``: then nothing is known."""

    async def launch(self, assignment: Assignment) -> None:
        """Start a worker. Raises :class:`NameTaken` or :class:`LaunchFailed`."""

    async def drain(self, replica: str) -> None:
        """Ask the worker to finish what it holds and exit; returns at once. Unknown names are ignored."""

    async def kill(self, replica: str) -> None:
        """End the worker with everything it started, and clear its remains. Idempotent."""

    async def list(self) -> list[Running]:
        """Every replica that exists, the dead whose remains are not cleared included."""


def replica_name(deployment: str, slot: int, generation: int) -> str:
    """The name of a replica."""
    return f"{deployment}-{slot}-{generation}"


def parse_replica(replica: str) -> tuple[str, int, int] | None:
    """Deployment, slot and generation of a replica's name; None when it is not one."""
    parts = replica.rsplit("-", 2)
    if len(parts) != 3 or not parts[0] or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    return parts[0], int(parts[1]), int(parts[2])


def fingerprint(deployment: Deployment) -> str:
    """Digest of what a worker reads at its start: another value asks for another worker."""
    read = {"model", "version", "env", "threads", "instances", "batching", "resources", "image"}
    start = deployment.model_dump(mode="json", include=read)
    return hashlib.sha256(json.dumps(start, sort_keys=True).encode()).hexdigest()[:16]
