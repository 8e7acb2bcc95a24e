"""Run workers as containers: the launcher of the compose stack.

The container engine stores the state of the replicas. It rejects a container name that is in use, so no
replica runs twice. Labels record how a container was launched and which GPUs it has. Labels cannot change, so
a file of the autoscaler stores the time when a drain began. If this file is lost, the worker's heartbeat
still reports the drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from services.autoscaler.adapters.docker.container_spec import (
    DEFAULTS,
    DRAIN_LIMIT,
    FINGERPRINT,
    GPUS,
    IMAGE_DIGEST,
    LAUNCHED_AT,
    REPLICA,
    STACK,
    DockerPlan,
    body,
)
from services.autoscaler.adapters.docker.drain_marks import DrainMarks
from services.autoscaler.adapters.docker.engine import Doc, Engine, EngineError
from services.autoscaler.adapters.docker.gpu_inventory import EngineGpus
from services.autoscaler.adapters.docker.images import Images
from services.autoscaler.adapters.replica_logs import ReplicaLogs
from services.autoscaler.domain.exit_message import describe_exit, with_last_log_line
from services.autoscaler.domain.gpus import GpuClaim, GpuInventory, NoRoom, from_label, place, stands
from services.autoscaler.domain.launcher import (
    LaunchFailed,
    LaunchSpec,
    NameTaken,
    NoFreeGpu,
    Running,
    parse_replica,
    pool_of,
)
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import replica_token
from tidegate.kernel.protocol.models import Assignment
from tidegate.kernel.protocol.warm_pool import WarmAssignment

log = telemetry.logger(__name__)

# In a class with a method `list`, the annotation `list[...]` would refer to this method. These names avoid
# this.
Rows = list[Doc]
Replicas = list[Running]

# Up to this age in seconds, a container that is not started is treated as alive, because another process may
# be launching it.
LAUNCH_GRACE_S = 5.0
LAST_LINES = 20
KEPT_LINES = 2000
ALIVE = {"running", "paused", "restarting"}
HOLDS_GPUS = ALIVE | {"created"}


class DockerLauncher:
    """A :class:`Launcher` of containers."""

    def __init__(
        self,
        plan: DockerPlan,
        engine: Engine,
        inventory: GpuInventory | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan = plan
        self._engine = engine
        self._inventory = inventory or EngineGpus(engine, plan)
        self._clock = clock
        self._images = Images(engine, plan.pull)
        self._marks = DrainMarks(plan.state_dir / "draining")
        self._logs = ReplicaLogs(plan.state_dir / "log", plan.logs)
        self._launching: set[str] = set()
        # Without this lock, two launches of this process could choose the same GPU, and one would fail.
        self._choosing = asyncio.Lock()

    async def launch(self, assignment: Assignment | WarmAssignment) -> None:
        """Create a container with its assignment, and start it.

        Raise ``NameTaken`` if the replica exists, and ``LaunchFailed`` if the launch fails.
        """
        start = LaunchSpec.of(assignment)
        replica, resources = start.replica, start.resources
        self._launching.add(replica)
        try:
            if resources.gpus or resources.gpu_memory_mb:
                async with self._choosing:
                    await self._create_with_gpus(start)
            else:
                await self._create(start, {})
            await self._start(start)
        finally:
            self._launching.discard(replica)

    async def drain(self, replica: str) -> None:
        """Send SIGTERM to the worker, which finishes its work and exits."""
        name = self._plan.name(replica)
        with contextlib.suppress(EngineError):
            # The drain is stored before the signal. Otherwise a worker that exits immediately would seem to
            # have failed.
            await self._engine.inspect(name)
            self._marks.put(replica, self._clock())
            await self._engine.signal(name, "SIGTERM")

    async def kill(self, replica: str) -> None:
        """Kill and remove the container, and store the end of its output in the replica's log."""
        name = self._plan.name(replica)
        output = await self._engine.output(name, KEPT_LINES)
        if await self._engine.remove(name) and output:
            await asyncio.to_thread(self._logs.keep, replica, output)
        self._marks.drop(replica)

    async def list(self) -> Replicas:
        """Return every container of this stack that is a replica."""
        rows = await self._rows()
        found = await asyncio.gather(*(self._running(row) for row in rows))
        return sorted((each for each in found if each is not None), key=lambda each: each.replica)

    async def output(self, replica: str, lines: int) -> str:
        """Return the last lines of a container's output; empty if the container does not exist."""
        return await self._engine.output(self._plan.name(replica), min(lines, KEPT_LINES))

    async def close(self) -> None:
        """Close the client of the engine. Workers keep running."""
        self._engine.close()

    async def _rows(self) -> Rows:
        return await self._engine.containers({STACK: self._plan.stack, REPLICA: ""})

    # -- launching -------------------------------------------------------------------------------------------

    async def _create(self, start: LaunchSpec, gpus: dict[str, int]) -> None:
        reference = start.image or self._plan.image
        digest = await self._images.digest(reference)
        request = body(self._plan, start, reference, digest, gpus)
        try:
            await self._engine.create(self._plan.name(start.replica), request)
        except EngineError as error:
            if error.status == 409:
                raise NameTaken(f"A replica {start.replica} exists already.") from None
            raise LaunchFailed(f"The worker {start.replica} cannot be created: {error.message}") from error

    async def _create_with_gpus(self, start: LaunchSpec) -> None:
        replica = start.replica
        inventory = await self._inventory.gpus()
        try:
            shares = place(inventory, await self._claims(), start.resources)
        except NoRoom as reason:
            raise NoFreeGpu(f"The worker {replica} {reason}.") from None
        await self._create(start, shares)
        # Meanwhile, another process may have claimed the same GPU. Then the replica with the earlier GPU
        # claim gets the GPU.
        claims = await self._claims()
        mine = next((claim for claim in claims if claim.replica == replica), None)
        if mine is None or not stands(inventory, claims, mine):
            await self._engine.remove(self._plan.name(replica))
            raise NoFreeGpu(
                f"The worker {replica} lost its GPU to a worker that was launched at the same time."
            )

    async def _claims(self) -> Sequence[GpuClaim]:
        """Return the GPU claims of containers that run or will start."""
        rows = [row for row in await self._rows() if GPUS in row["Labels"] and row["State"] in HOLDS_GPUS]
        return [
            GpuClaim(row["Labels"][REPLICA], from_label(row["Labels"][GPUS]), await self._order(row))
            for row in rows
        ]

    async def _order(self, row: Doc) -> tuple[int, str, str]:
        """Return the sort key of a container's GPU claim. The claim with the smallest key wins.

        Started containers come first, then created containers by creation time, then removed containers.
        """
        if row["State"] != "created":
            return 0, "", row["Id"]
        try:
            found = await self._engine.inspect(self._plan.name(row["Labels"][REPLICA]))
            return 1, str(found["Created"]), row["Id"]
        except EngineError:  # the container was removed meanwhile
            return 2, "", row["Id"]

    async def _start(self, start: LaunchSpec) -> None:
        replica, name = start.replica, self._plan.name(start.replica)
        try:
            reference = start.image or self._plan.image
            uid = 0 if self._plan.model_users else await self._images.uid(reference)
            files = {
                # Secrets are in files, because everyone with access to the engine can read a container's
                # environment.
                "replica/token": replica_token.issue(self._plan.token, replica).encode(),
                "replica/assignment.json": start.document.encode(),
            }
            files |= {f"secrets/{path}": content for path, content in self._plan.secrets.items()}
            await self._engine.put_files(name, self._plan.home, files, uid)
            await self._engine.start(name)
        except BaseException as error:
            with contextlib.suppress(Unavailable):
                await self._engine.remove(name)
            if isinstance(error, EngineError):
                message = f"The worker {start.replica} cannot be started: {error.message}"
                raise LaunchFailed(message) from error
            raise

    # -- listing ---------------------------------------------------------------------------------------------

    async def _running(self, row: Doc) -> Running | None:
        labels = row["Labels"]
        parsed = parse_replica(labels[REPLICA])
        if parsed is None or row["State"] == "removing":
            return None
        alive = self._alive(row)
        ending, out_of_memory, ended_at = ("", False, None) if alive else await self._ending(row)
        return Running(
            replica=labels[REPLICA],
            deployment=parsed[0],
            slot=parsed[1],
            generation=parsed[2],
            pid=0,  # only the engine knows the pid
            alive=alive,
            launched_at=_number(labels.get(LAUNCHED_AT), float(row["Created"])),
            fingerprint=self._fingerprint(parsed[0], labels),
            drain_limit_s=_number(labels.get(DRAIN_LIMIT), 0.0),
            draining_since=self._marks.since(labels[REPLICA]),
            ending=ending,
            out_of_memory=out_of_memory,
            image=labels.get(IMAGE_DIGEST, ""),
            gpus=tuple(sorted(from_label(labels.get(GPUS, "")))),
            ended_at=ended_at,
        )

    def _fingerprint(self, deployment: str, labels: Mapping[str, str]) -> str:
        """Return the fingerprint of the configuration with which the replica was launched.

        If a warm pool's worker was started with outdated settings, return an empty string, so that the worker
        counts as outdated.
        """
        stale = pool_of(deployment) is not None and labels.get(DEFAULTS) != self._plan.defaults
        return "" if stale else labels.get(FINGERPRINT, "")

    def _alive(self, row: Doc) -> bool:
        if row["State"] == "created":
            age_s = self._clock() - row["Created"]
            return row["Labels"][REPLICA] in self._launching or age_s < LAUNCH_GRACE_S
        return row["State"] in ALIVE

    async def _ending(self, row: Doc) -> tuple[str, bool, float | None]:
        """Return how a container ended, whether it ran out of memory, and when it ended."""
        if row["State"] == "created":
            return "the launch was interrupted before the replica started", False, None
        # Inspect by name, not by id, because the engine's proxy checks names.
        name = self._plan.name(row["Labels"][REPLICA])
        try:
            found = await self._engine.inspect(name)
        except EngineError:  # the container was removed meanwhile
            return describe_exit(None), False, None
        how, out_of_memory = _ending_of(found)
        output = await self._engine.output(name, LAST_LINES)
        return with_last_log_line(how, output), out_of_memory, finished_at(found["State"])


def _ending_of(found: Doc) -> tuple[str, bool]:
    state, limit_mb = found["State"], found["HostConfig"]["Memory"] // (1024 * 1024)
    code = int(state["ExitCode"])
    # If a signal ended the worker, the init process exits with 128 + the signal's number.
    how = describe_exit(128 - code if 128 < code < 128 + 65 else code)
    if state.get("OOMKilled"):
        limit = f"the container's limit of {limit_mb} MiB" if limit_mb else "the memory of the machine"
        return f"{how}, out of memory: the worker reached {limit}", True
    if state.get("Error"):
        return f"{how} ({state['Error']})", False
    return how, False


def finished_at(state: Doc) -> float | None:
    """Return when a container ended (seconds since the epoch), from its state; None if not known."""
    text = str(state.get("FinishedAt", ""))
    try:
        found = datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
    return found if found > 0 else None  # the year 1 means that the container has not ended


def _number(text: str | None, otherwise: float) -> float:
    try:
        return float(text or "")
    except ValueError:
        return otherwise
