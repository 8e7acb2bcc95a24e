"""Workers as processes of this machine: the launcher of the embedded stack.

A worker is started in a session of its own, so that a signal to the autoscaler does not reach it and
its whole group can be ended. It outlives the autoscaler; the next one adopts it from its folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.autoscaler.adapters.process import procfs
from services.autoscaler.adapters.process.gpu_inventory import MachineGpus
from services.autoscaler.adapters.process.replica_folder import ReplicaFolder
from services.autoscaler.adapters.replica_logs import ReplicaLogs
from services.autoscaler.domain.exit_message import describe_exit, with_last_log_line
from services.autoscaler.domain.gpus import Gpu, GpuClaim, GpuInventory, NoRoom, Shares, place
from services.autoscaler.domain.launcher import LaunchFailed, LaunchSpec, Running, parse_replica
from services.autoscaler.domain.log_retention import LogLimits
from tidegate.kernel import model_users
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import replica_token
from tidegate.kernel.protocol.models import Assignment, WarmAssignment

# Inside a class with a method `list` the builtin of that name cannot be written as a type.
Replicas = list[Running]
Folders = list[ReplicaFolder]

# How long a folder without any sign of a process may belong to a launch that is under way.
LAUNCH_GRACE_S = 5.0
KILL_TIMEOUT_S = 5.0
TAIL_BYTES = 4000
MEASURE_EVERY_S = 5.0
MIB = 1024 * 1024
# Each change of a replica's memory goes into the record of rounds, so noise is no change.
MEMORY_STEP = 16 * MIB
# CUDA numbers the devices of a process from 0, in this order.
DEVICES, DEVICE_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """How workers are started here: the command (the replica's folder is appended), and where.

    ``token``: the service token, from which those of replicas follow. ``environment``: the workers', whole.
    """

    command: Sequence[str]
    state_dir: Path
    token: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    cwd: Path | None = None
    logs: LogLimits | None = None


def _refuse_what_containers_have(start: LaunchSpec) -> None:
    """Raise ``LaunchFailed`` for a wish that a process of the machine cannot be held to."""
    for given, what in ((start.image, "image"), (start.resources.shm_mb, "resources.shm_mb")):
        if given is not None:
            raise LaunchFailed(
                f"The worker {start.replica} cannot have {what} ({given}): workers are processes of this "
                "machine, and only containers have that. Deploy without it, or set TIDEGATE_LAUNCHER=docker."
            )


class ProcessLauncher:
    """See :class:`services.autoscaler.domain.launcher.Launcher`."""

    def __init__(
        self, plan: ProcessPlan, inventory: GpuInventory | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._plan = plan
        self._inventory = inventory or MachineGpus()
        self._clock = clock
        self._replicas = plan.state_dir / "replicas"
        self._logs = ReplicaLogs(plan.state_dir / "log", plan.logs)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._memory: dict[int, int] = {}
        self._measured_at = float("-inf")

    async def launch(self, assignment: Assignment | WarmAssignment) -> None:
        """Start a worker process. Raises ``NameTaken`` or ``LaunchFailed``."""
        start = LaunchSpec.of(assignment)
        _refuse_what_containers_have(start)
        if start.resources.gpus or start.resources.gpu_memory_mb:
            await asyncio.to_thread(self._launch_with_gpus, start, await self._inventory.gpus())
        else:
            await asyncio.to_thread(self._launch, start, {})

    async def drain(self, replica: str) -> None:
        """SIGTERM to the worker alone, not to its group: it needs its Triton to finish."""
        await asyncio.to_thread(self._drain, replica)

    async def kill(self, replica: str) -> None:
        """SIGKILL to the worker and everything it left, then its folder goes; its log stays for a while.

        Raises ``Unavailable`` when something does not die: the name stays taken until it does.
        """
        await asyncio.to_thread(self._kill, replica)

    async def list(self) -> Replicas:
        """Every replica that has a folder."""
        return await asyncio.to_thread(self._list)

    async def output(self, replica: str, lines: int) -> str:
        """Return nothing: a worker writes to its log."""
        return ""

    def log_path(self, replica: str) -> Path:
        """Where the worker's output goes."""
        return self._logs.path(replica)

    def _launch_with_gpus(self, start: LaunchSpec, inventory: Sequence[Gpu]) -> None:
        # Held until the worker runs: another launch, also of another autoscaler process, sees its claim.
        with self._choosing():
            try:
                shares = place(inventory, self._claims(), start.resources)
            except NoRoom as reason:
                raise LaunchFailed(f"The worker {start.replica} {reason}.") from None
            self._launch(start, shares)

    @contextlib.contextmanager
    def _choosing(self) -> Iterator[None]:
        """Let one launch at a time choose GPUs."""
        self._plan.state_dir.mkdir(parents=True, exist_ok=True)
        with (self._plan.state_dir / "gpus.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _claims(self) -> Sequence[GpuClaim]:
        """Return what is held of GPUs by what runs; what a dead worker left running holds them, too."""
        found = [(folder, folder.gpus()) for folder in self._folders()]
        return [
            GpuClaim(folder.replica, shares)
            for folder, shares in found
            if shares and (self._alive(folder) or procfs.owned(self._owner(folder)))
        ]

    def _launch(self, start: LaunchSpec, gpus: Shares) -> None:
        folder = self._folder(start.replica)
        folder.create(start, replica_token.issue(self._plan.token, start.replica), gpus)
        log_path = self.log_path(start.replica)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log_path.open("ab") as output:
                child = subprocess.Popen(
                    [*self._plan.command, str(folder.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment(start.replica, gpus),
                    cwd=self._plan.cwd,
                    start_new_session=True,
                )
        except OSError as error:
            folder.remove()
            raise LaunchFailed(f"The worker {start.replica} cannot be started: {error}.") from error
        self._children[start.replica] = child
        folder.note_process(child.pid)

    def _environment(self, replica: str, gpus: Shares) -> dict[str, str]:
        mark = {procfs.MARK: replica, procfs.SCOPE: str(self._plan.state_dir)}
        # Empty for a replica without GPUs: it sees none of those that others hold.
        devices = {DEVICES: ",".join(sorted(gpus)), DEVICE_ORDER: "PCI_BUS_ID"}
        return {**self._plan.environment, **devices, **mark}

    def _drain(self, replica: str) -> None:
        folder = self._folder(replica)
        if not folder.path.is_dir():
            return
        folder.mark_draining(self._clock())
        worker = self._worker(folder)
        if worker is not None:
            procfs.send(worker, signal.SIGTERM)

    def _worker(self, folder: ReplicaFolder) -> procfs.Process | None:
        """The worker's own process, if it is certain that it is this one."""
        child = self._children.get(folder.replica)
        if child is not None:
            return procfs.read(child.pid) if child.poll() is None else None
        if (noted := folder.noted_process()) is not None:
            return noted
        pid = folder.worker_pid()
        mark = procfs.mark_of(pid) if pid and folder.lock_held() else None
        return procfs.read(pid) if mark is not None and mark[0] == folder.replica else None

    def _kill(self, replica: str) -> None:
        folder = self._folder(replica)
        left = procfs.kill_all(self._owner(folder), KILL_TIMEOUT_S)
        if not left:
            # The environment of another user's process, which has the mark, may be closed to this one.
            model_users.end_left(folder.model_user())
        child = self._children.get(replica)
        if child is not None and not left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1.0)
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise Unavailable(f"Processes of {replica} do not die: {pids}.")
        self._children.pop(replica, None)
        folder.remove()
        self._logs.prune(lambda each: self._folder(each).path.is_dir())

    def _owner(self, folder: ReplicaFolder) -> procfs.ReplicaIdentity:
        child = self._children.get(folder.replica)
        leader = child.pid if child is not None else folder.worker_pid()
        return procfs.ReplicaIdentity(folder.replica, folder.path, self._plan.state_dir, leader)

    def _list(self) -> Replicas:
        if time.monotonic() - self._measured_at >= MEASURE_EVERY_S:
            self._memory, self._measured_at = procfs.memory_by_session(), time.monotonic()
        found = (self._running(folder) for folder in self._folders())
        return sorted((each for each in found if each is not None), key=lambda each: each.replica)

    def _folders(self) -> Folders:
        try:
            return [ReplicaFolder(path) for path in self._replicas.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Unavailable(f"The replicas' folder cannot be read: {error}.") from error

    def _running(self, folder: ReplicaFolder) -> Running | None:
        parsed = parse_replica(folder.replica)
        if parsed is None:
            return None
        deployment, slot, generation = parsed
        launched_at, drain_limit_s = folder.launched()
        alive = self._alive(folder)
        return Running(
            replica=folder.replica,
            deployment=deployment,
            slot=slot,
            generation=generation,
            pid=folder.worker_pid(),
            alive=alive,
            launched_at=launched_at,
            fingerprint=folder.fingerprint(),
            drain_limit_s=drain_limit_s,
            draining_since=folder.draining_since(),
            ending="" if alive else self._ending(folder.replica),
            gpus=tuple(sorted(folder.gpus())),
            memory_mb=self._memory_mb(folder),
        )

    def _memory_mb(self, folder: ReplicaFolder) -> int:
        """What the replica's processes take, in steps; a worker is the leader of its session."""
        return -(-self._memory.get(folder.worker_pid(), 0) // MEMORY_STEP) * MEMORY_STEP // MIB

    def _alive(self, folder: ReplicaFolder) -> bool:
        """The strongest sign decides: our own child, the lock, the noted process, a marked process."""
        child = self._children.get(folder.replica)
        if child is not None:
            return child.poll() is None  # this also reaps it
        held = folder.lock_held()
        if held is not None:
            return held
        if folder.noted_process() is not None or procfs.owned(self._owner(folder)):
            return True
        return self._clock() - folder.born() < LAUNCH_GRACE_S

    def _ending(self, replica: str) -> str:
        child = self._children.get(replica)
        how = describe_exit(child.returncode if child is not None else None)
        return with_last_log_line(how, self._tail(replica))

    def _tail(self, replica: str) -> str:
        try:
            with self.log_path(replica).open("rb") as output:
                output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL_BYTES))
                return output.read().decode(errors="replace")
        except OSError:
            return ""

    def _folder(self, replica: str) -> ReplicaFolder:
        return ReplicaFolder(self._replicas / replica)
