"""Run each worker as a process of this machine: the launcher of a stack without containers.

Each worker runs in an operating system session of its own. So signals to the autoscaler do not reach the
worker, and the worker's whole process group can be killed. Workers keep running when the autoscaler ends. The
next autoscaler finds them by their replica folders.
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
from dataclasses import dataclass, field, replace
from pathlib import Path

from services.autoscaler.adapters.process import procfs
from services.autoscaler.adapters.process.gpu_inventory import MachineGpus
from services.autoscaler.adapters.process.process_ends import ProcessEnds
from services.autoscaler.adapters.process.replica_folder import ReplicaFolder
from services.autoscaler.adapters.replica_logs import ReplicaLogs
from services.autoscaler.domain.exit_message import describe_exit, with_last_log_line
from services.autoscaler.domain.gpus import Gpu, GpuClaim, GpuInventory, NoRoom, Shares, place
from services.autoscaler.domain.launcher import (
    LaunchFailed,
    LaunchSpec,
    NoFreeGpu,
    OptionsRefused,
    Running,
    parse_replica,
)
from services.autoscaler.domain.log_retention import LogLimits
from tidegate.kernel import model_users
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import replica_token
from tidegate.kernel.protocol.models import Assignment
from tidegate.kernel.protocol.warm_pool import WarmAssignment

# In a class with a method `list`, the annotation `list[...]` would refer to this method. These names avoid
# this.
Replicas = list[Running]
Folders = list[ReplicaFolder]

# Up to this age in seconds, a replica without a process is treated as alive, because its launch may still be
# running.
LAUNCH_GRACE_S = 5.0
KILL_TIMEOUT_S = 5.0
TAIL_BYTES = 4000
MEASURE_EVERY_S = 5.0
MIB = 1024 * 1024
# Measured memory is rounded up to a multiple of this number of bytes. Otherwise each small change would add
# an entry to the recordings.
MEMORY_STEP = 16 * MIB
# CUDA's environment variables: the devices that a process sees, and how CUDA numbers them.
DEVICES, DEVICE_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """The settings for workers as processes.

    - ``command``: the command that starts a worker; the launcher appends the path of the replica's folder
    - ``token``: the service token, from which the tokens of replicas are derived
    - ``environment``: the workers' environment, to which the launcher adds the GPUs and the replica's name
    """

    command: Sequence[str]
    state_dir: Path
    token: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    cwd: Path | None = None
    logs: LogLimits | None = None


def _reject_container_options(start: LaunchSpec) -> None:
    """Raise ``OptionsRefused`` if an option is set that only containers support."""
    for value, option in ((start.image, "image"), (start.resources.shm_mb, "resources.shm_mb")):
        if value is not None:
            raise OptionsRefused(
                f"The worker {start.replica} cannot use {option} ({value}): workers are processes, and only "
                f"containers support this option. Deploy without {option}, or set TIDEGATE_LAUNCHER=docker."
            )


class ProcessLauncher:
    """A :class:`Launcher` that runs each worker as a process of this machine."""

    def __init__(
        self, plan: ProcessPlan, inventory: GpuInventory | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._plan = plan
        self._inventory = inventory or MachineGpus()
        self._clock = clock
        self._replicas = plan.state_dir / "replicas"
        self._logs = ReplicaLogs(plan.state_dir / "log", plan.logs)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._ends = ProcessEnds(clock)
        self._memory: dict[int, int] = {}
        self._measured_at = float("-inf")

    async def launch(self, assignment: Assignment | WarmAssignment) -> None:
        """Start a worker process.

        Raise ``NameTaken`` if the replica exists, and ``LaunchFailed`` if the launch fails.
        """
        start = LaunchSpec.of(assignment)
        _reject_container_options(start)
        if start.resources.gpus or start.resources.gpu_memory_mb:
            await asyncio.to_thread(self._launch_with_gpus, start, await self._inventory.gpus())
        else:
            await asyncio.to_thread(self._launch, start, {})
        self._ends.watch(start.replica, self._children[start.replica].pid)

    async def drain(self, replica: str) -> None:
        """Send SIGTERM to the worker, but not to Triton, which the worker needs to finish its work."""
        await asyncio.to_thread(self._drain, replica)

    async def kill(self, replica: str) -> None:
        """Kill the worker and its processes, and remove the replica's folder. The log is kept for a while.

        Raise ``Unavailable`` if a process does not die. Until all have died, the replica's name stays in use.
        """
        await asyncio.to_thread(self._kill, replica)
        self._ends.forget(replica)

    async def list(self) -> Replicas:
        """Return every replica that has a folder."""
        rows = await asyncio.to_thread(self._list)
        for row in rows:
            if row.alive and row.pid:  # a replica from an earlier autoscaler is not watched yet
                self._ends.watch(row.replica, row.pid)
        return [row if row.alive else replace(row, ended_at=self._ends.ended_at(row.replica)) for row in rows]

    async def output(self, replica: str, lines: int) -> str:
        """Return an empty string, because the worker writes its output to the log folder."""
        return ""

    def log_path(self, replica: str) -> Path:
        """Return the path of the worker's log."""
        return self._logs.path(replica)

    def _launch_with_gpus(self, start: LaunchSpec, inventory: Sequence[Gpu]) -> None:
        # Hold the lock until the worker has started. Otherwise another launch could miss this worker's GPU
        # claim and choose the same GPU.
        with self._choosing():
            try:
                shares = place(inventory, self._claims(), start.resources)
            except NoRoom as reason:
                raise NoFreeGpu(f"The worker {start.replica} {reason}.") from None
            self._launch(start, shares)

    @contextlib.contextmanager
    def _choosing(self) -> Iterator[None]:
        """Hold the lock that lets only one launch at a time choose GPUs."""
        self._plan.state_dir.mkdir(parents=True, exist_ok=True)
        with (self._plan.state_dir / "gpus.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _claims(self) -> Sequence[GpuClaim]:
        """Return the GPU claims of live workers, and of dead workers with child processes that still run."""
        found = [(folder, folder.gpus()) for folder in self._folders()]
        return [
            GpuClaim(folder.replica, shares)
            for folder, shares in found
            if shares and (self._alive(folder) or procfs.processes_of(self._owner(folder)))
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
        # The list of GPUs is empty for a replica without GPUs, so that the replica sees no GPU.
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
        """Return the worker's process; None if it has ended, or if it cannot be identified with certainty."""
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
            # `kill_all` cannot find processes of another user, because it cannot read their environment. So
            # end the processes of the model's user here.
            model_users.end_left(folder.model_user())
        child = self._children.get(replica)
        if child is not None and not left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1.0)
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise Unavailable(f"Processes of {replica} still run although they were killed: {pids}.")
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
        """Return the memory in MiB that the replica's processes use.

        The number is rounded up, so that the memory is a multiple of ``MEMORY_STEP`` bytes.
        """
        return -(-self._memory.get(folder.worker_pid(), 0) // MEMORY_STEP) * MEMORY_STEP // MIB

    def _alive(self, folder: ReplicaFolder) -> bool:
        """Return True if the worker lives or may still be starting.

        A child of this process lives until the kernel reports its end. For any other worker, the lock file
        decides: a worker whose pid is in the file lives while it holds the lock.

        If the lock file has no pid yet, the worker counts as alive while any process of the replica lives.
        Without such a process, the worker counts as alive until the folder is ``LAUNCH_GRACE_S`` seconds old,
        because the launch may still be running.
        """
        child = self._children.get(folder.replica)
        if child is not None:
            return child.poll() is None  # `poll` also reaps the child
        held = folder.lock_held()
        if held is not None:
            return held
        if folder.noted_process() is not None or procfs.processes_of(self._owner(folder)):
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
