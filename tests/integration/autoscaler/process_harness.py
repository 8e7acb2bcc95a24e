"""A harness that runs workers as processes, in a separate state folder."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from services.autoscaler.adapters.process import procfs
from services.autoscaler.adapters.process.gpu_inventory import MachineGpus
from services.autoscaler.adapters.process.launcher import ProcessLauncher, ProcessPlan
from services.autoscaler.adapters.process.replica_folder import ReplicaFolder
from tests.integration.autoscaler.worker_script import WORKER


class ProcessHarness:
    """A state folder with launchers. Everything that was started ends with the test."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.script = state / "worker.py"
        self.script.write_text(WORKER)
        self.nvidia_smi = state / "nvidia-smi"
        self._launchers: list[ProcessLauncher] = []
        self._others: list[ProcessHarness] = []

    def launcher(self, mode: str = "", late_s: float = 0.0) -> ProcessLauncher:
        """Return a new launcher without children, as after a restart; its clock is ``late_s`` ahead."""
        command = [sys.executable, "-S", "-E", str(self.script)]
        plan = ProcessPlan(command, self.state, environment={**os.environ, "MODE": mode})
        inventory = MachineGpus(str(self.nvidia_smi))
        self._launchers.append(ProcessLauncher(plan, inventory, lambda: time.time() + late_s))
        return self._launchers[-1]

    def has_gpus(self, *rows: str, code: int = 0) -> None:
        """Write an `nvidia-smi` that prints these rows and exits with ``code``."""
        listing = "".join(f"{row}\\n" for row in rows)
        # It answers only the query of the launcher.
        asked = "--query-gpu=uuid,memory.total,name --format=csv,noheader,nounits"
        script = f'#!/bin/sh\n[ "$*" = "{asked}" ] || exit 9\nprintf "{listing}"\nexit {code}\n'
        self.nvidia_smi.write_text(script)
        self.nvidia_smi.chmod(0o755)

    def environment(self, replica: str) -> dict[str, str]:
        """Return the environment that the worker was started with."""
        pid = ReplicaFolder(self.state / "replicas" / replica).worker_pid()
        pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if pair)

    def other(self) -> ProcessHarness:
        """Return a harness of another stack on the same machine."""
        folder = self.state / "other"
        folder.mkdir()
        self._others.append(ProcessHarness(folder))
        return self._others[-1]

    def processes(self, replica: str) -> list[procfs.Process]:
        folder = self.state / "replicas" / replica
        return procfs.processes_of(procfs.ReplicaIdentity(replica, folder, self.state, 0))

    def alive(self, replica: str) -> int:
        """Return the number of processes of the replica."""
        return len(self.processes(replica))

    def crash(self, replica: str) -> None:
        """Kill the worker process."""
        pid = ReplicaFolder(self.state / "replicas" / replica).worker_pid()
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: procfs.read(pid) is None, "the worker is dead")

    def cut_off(self, replica: str) -> None:
        """Create what an interrupted launch leaves, before it started a process."""
        (self.state / "replicas" / replica).mkdir(parents=True)

    def output(self, replica: str) -> str:
        """Return the output of the worker, even after its end."""
        return (self.state / "log" / f"worker-{replica}.log").read_text()

    def left(self) -> list[str]:
        """Return the replicas that have left anything."""
        return sorted({path.name for path in self.folders()} | procfs.marked_in(self.state))

    def until(self, true: Callable[[], object], what: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.01)

    def until_up(self, *replicas: str) -> None:
        """Wait until the workers have their lock and their child process."""
        for replica in replicas:
            self.until(ReplicaFolder(self.state / "replicas" / replica).lock_held, f"{replica} is up")

    def clear(self) -> None:
        for other in self._others:
            other.clear()
        for replica in procfs.marked_in(self.state) | {p.name for p in self.folders()}:
            for process in self.processes(replica):
                procfs.send(process, signal.SIGKILL)
        for child in (child for each in self._launchers for child in each._children.values()):
            # A process that was just forked does not show its mark yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(timeout=60)

    def folders(self) -> list[Path]:
        replicas = self.state / "replicas"
        return sorted(replicas.iterdir()) if replicas.is_dir() else []
