"""The interface of launchers, and the names of replicas.

A launcher starts workers somewhere (processes, containers, pods) and decides nothing. The name of a
replica, ``<deployment>-<slot>-<generation>``, is unique: a launcher refuses a name that exists.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import dataclass
from typing import Protocol

from tidegate.kernel.errors import Conflict, Unavailable
from tidegate.kernel.protocol.models import Assignment, Deployment, Resources
from tidegate.kernel.protocol.warm_pool import WarmAssignment, WarmPoolSpec

# The drain limit of a warm pool's worker, in seconds. The container engine's `stop` waits this long before it
# kills a container. The container keeps this limit when the worker becomes a replica. A worker that is not
# yet a replica has no work to finish, so it ends immediately.
POOL_DRAIN_S = 600.0


class NameTaken(Conflict):
    """A replica with this name exists: it runs, or its container or files are not removed yet."""


class LaunchFailed(Unavailable):
    """The worker could not be started. The message says why."""


class NoFreeGpu(LaunchFailed):
    """The machine has no free GPU for the worker."""


class OptionsRefused(LaunchFailed):
    """The launcher cannot start any worker with these options of the Deployment."""


@dataclass(frozen=True, slots=True)
class Running:
    """A replica that exists at the launcher. ``alive`` is False if only its container or files are left.

    Times are seconds since the epoch. ``pid`` is 0 while it is not known. ``fingerprint`` is the Deployment's
    fingerprint at the launch. ``ending`` says how a dead worker ended, if that is known; ``out_of_memory``
    means that the kernel killed the worker at its memory limit. ``image`` is the container's image with its
    digest, ``gpus`` has the UUIDs of the replica's GPUs. ``worker`` is the launcher's name for a replica that
    came from a warm pool. ``memory_mb`` is the memory of the replica's processes; 0 if not known.
    ``ended_at`` is the time when a dead worker's process ended; None if not known.
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
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """The parts of an assignment that a launcher uses. The worker gets the whole ``document``."""

    replica: str
    launched_at: float
    drain_limit_s: float
    fingerprint: str
    image: str | None
    resources: Resources
    document: str

    @classmethod
    def of(cls, assignment: Assignment | WarmAssignment) -> LaunchSpec:
        """Return the parts of an assignment that a launcher uses.

        The assignment is for a replica or for a worker of a warm pool.
        """
        if isinstance(assignment, WarmAssignment):
            pool = assignment.pool
            drain_limit_s, digest = POOL_DRAIN_S, pool_fingerprint(pool)
            image, resources = pool.image, pool.resources
        else:
            deployment = assignment.deployment
            drain_limit_s, digest = deployment.drain_limit_s, fingerprint(deployment)
            image, resources = deployment.image, deployment.resources
        document = assignment.model_dump_json()
        return cls(
            assignment.replica, assignment.launched_at, drain_limit_s, digest, image, resources, document
        )


class Launcher(Protocol):
    """The interface of launchers.

    If a method raises ``Unavailable`` (but not its subclass :class:`LaunchFailed`), it is not known whether
    the operation took effect.
    """

    async def launch(self, assignment: Assignment | WarmAssignment) -> None:
        """Start a worker.

        Raise :class:`NameTaken` if a replica with this name exists, and :class:`LaunchFailed` if the worker
        cannot be started.
        """

    async def drain(self, replica: str) -> None:
        """Let the worker finish its work and exit. Return immediately; ignore unknown names."""

    async def kill(self, replica: str) -> None:
        """Kill the worker and everything that it started, and remove its container or files. Idempotent."""

    async def list(self) -> list[Running]:
        """Return every replica that exists, including dead replicas whose container or files are left."""

    async def output(self, replica: str, lines: int) -> str:
        """Return the last lines of a replica's output; empty if the output goes to the log folder."""


def replica_name(deployment: str, slot: int, generation: int) -> str:
    """Return the name of a replica."""
    return f"{deployment}-{slot}-{generation}"


def deployment_of_pool(pool: str) -> str:
    """Return the text that replaces the Deployment's name in the names of a pool's workers.

    It ends with ``-``, so it is never the name of a Deployment.
    """
    return f"warm-{pool}-"


def pool_of(deployment: str) -> str | None:
    """Return the pool that :func:`deployment_of_pool` put into a name; None for a Deployment's name."""
    return deployment[5:-1] if deployment.startswith("warm-") and deployment.endswith("-") else None


def parse_replica(replica: str) -> tuple[str, int, int] | None:
    """Split a replica's name into Deployment, slot and generation. Return None for any other name."""
    parts = replica.rsplit("-", 2)
    if len(parts) != 3 or not parts[0] or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    return parts[0], int(parts[1]), int(parts[2])


def fingerprint(deployment: Deployment) -> str:
    """Return a digest of the fields that a worker reads at its start.

    If the digest changes, the worker is replaced.
    """
    known = _fingerprints.get(id(deployment))
    if known is not None and known[0]() is deployment:
        return known[1]
    key, found = id(deployment), _fingerprint(deployment)
    _fingerprints[key] = weakref.ref(deployment, lambda _: _fingerprints.pop(key, None)), found
    return found


# The digests of the objects that still exist, by their ids. Each round needs the digests of all Deployments,
# and the objects stay the same until the desired state changes.
_fingerprints: dict[int, tuple[weakref.ref[Deployment], str]] = {}


def _fingerprint(deployment: Deployment) -> str:
    read = {"model", "version", "env", "threads", "instances", "batching", "resources", "image"}
    # The optional fields below count only if they are set. So a Deployment that sets none of them keeps the
    # digest that it had before these fields existed. An upgrade of Tidegate does not replace its workers.
    if deployment.progress_timeout_s is not None:
        read.add("progress_timeout_s")
    for name in ("sampling", "keep_rows", "redact"):
        if getattr(deployment, name) != type(deployment).model_fields[name].get_default(
            call_default_factory=True
        ):
            read.add(name)
    if deployment.llm is not None:
        read.add("llm")
    if deployment.upstream is not None:
        read.add("upstream")
    # Only gateways read `affinity_wait_ms`. So a change of this setting does not replace workers.
    # `credential_header` counts only if it is set, like the optional fields above.
    exclude = {"llm": {"affinity_wait_ms"}, "upstream": set[str]()}
    for name, spec in (("llm", deployment.llm), ("upstream", deployment.upstream)):
        if spec is not None and spec.credential_header is None:
            exclude[name].add("credential_header")
    return _digest(deployment.model_dump(mode="json", include=read, exclude=exclude))


def pool_fingerprint(pool: WarmPoolSpec) -> str:
    """Return a digest of the options with which a worker of a warm pool is started."""
    return _digest(pool.model_dump(mode="json", exclude={"workers"}))


def _digest(start: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(start, sort_keys=True).encode()).hexdigest()[:16]
