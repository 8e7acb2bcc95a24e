"""Workers as processes of this machine: the launcher of the embedded stack.

A worker is started in a session of its own, so that a signal to the autoscaler does not reach it and
its whole group can be ended. It outlives the autoscaler; the next one adopts it from its folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.autoscaler.adapters import procfs
from services.autoscaler.adapters.kept_logs import KeptLogs
from services.autoscaler.adapters.last_words import how_it_ended, with_last_line
from services.autoscaler.adapters.replica_folder import ReplicaFolder
from services.autoscaler.domain.launcher import LaunchFailed, Running, Start, parse_replica
from tidegate import model_users
from tidegate.errors import Unavailable
from tidegate.protocol import replica_token
from tidegate.protocol.models import Assignment, WarmAssignment

# Inside a class with a method `list` the builtin of that name cannot be written as a type.
Replicas = list[Running]

# How long a folder without any sign of a process may belong to a launch that is under way.
LAUNCH_GRACE_S = 5.0
KILL_TIMEOUT_S = 5.0
TAIL_BYTES = 4000


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


class ProcessLauncher:
    """See :class:`services.autoscaler.domain.launcher.Launcher`."""

    def __init__(self, plan: ProcessPlan, clock: Callable[[], float] = time.time) -> None:
        self._plan = plan
        self._clock = clock
        self._replicas = plan.state_dir / "replicas"
        self._logs = KeptLogs(plan.state_dir / "log")
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    async def launch(self, assignment: Assignment | WarmAssignment) -> None:
        """Start a worker process. Raises ``NameTaken`` or ``LaunchFailed``."""
        await asyncio.to_thread(self._launch, Start.of(assignment))

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

    def log_path(self, replica: str) -> Path:
        """Where the worker's output goes."""
        return self._logs.path(replica)

    def _launch(self, start: Start) -> None:
        folder = self._folder(start.replica)
        folder.create(start, replica_token.issue(self._plan.token, start.replica))
        log_path = self.log_path(start.replica)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log_path.open("ab") as output:
                child = subprocess.Popen(
                    [*self._plan.command, str(folder.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment(start.replica),
                    cwd=self._plan.cwd,
                    start_new_session=True,
                )
        except OSError as error:
            folder.remove()
            raise LaunchFailed(f"The worker {start.replica} cannot be started: {error}.") from error
        self._children[start.replica] = child
        folder.note_process(child.pid)

    def _environment(self, replica: str) -> dict[str, str]:
        mark = {procfs.MARK: replica, procfs.SCOPE: str(self._plan.state_dir)}
        return {**self._plan.environment, **mark}

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

    def _owner(self, folder: ReplicaFolder) -> procfs.Owner:
        child = self._children.get(folder.replica)
        leader = child.pid if child is not None else folder.worker_pid()
        return procfs.Owner(folder.replica, folder.path, self._plan.state_dir, leader)

    def _list(self) -> Replicas:
        try:
            folders = [ReplicaFolder(path) for path in self._replicas.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Unavailable(f"The replicas' folder cannot be read: {error}.") from error
        found = (self._running(folder) for folder in folders)
        return sorted((each for each in found if each is not None), key=lambda each: each.replica)

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
        )

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
        how = how_it_ended(child.returncode if child is not None else None)
        return with_last_line(how, self._tail(replica))

    def _tail(self, replica: str) -> str:
        try:
            with self.log_path(replica).open("rb") as output:
                output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL_BYTES))
                return output.read().decode(errors="replace")
        except OSError:
            return ""

    def _folder(self, replica: str) -> ReplicaFolder:
        return ReplicaFolder(self._replicas / replica)
