"""Stop a stack: first its children in order, then every other process with the stack's mark."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tidegate.kernel import model_users
from tidegate.stack import launch, processes
from tidegate.stack.child import Child
from tidegate.stack.plan import SWEEP_LIMIT_S, log_file
from tidegate.stack.processes import Process
from tidegate.stack.record import ChildPhase

Report = Callable[[str, ChildPhase, str], None]
"""Called with a child's name, its new state, and a detail."""

LEFTOVER_GRACE_S = 3.0


def stop_children(
    children: Sequence[Child], running: dict[str, Process], state: Path, report: Report
) -> None:
    """Stop the children by ascending ``stop_order``. Then end the stack's other processes.

    Each child gets its own grace time. A child that still runs after its grace time is killed.
    """
    for child in sorted(children, key=lambda c: c.stop_order):
        process = running.get(child.name)
        if process and process.alive():
            report(child.name, "stopping", "")
            processes.stop([process], child.grace_s)
        if child.after_stop:
            _after(child, state, report)
        if process or child.after_stop:
            report(child.name, "stopped", "")
    sweep(state)


def sweep(state: Path) -> list[Process]:
    """End every process with the stack's mark. Return the processes that were found.

    Also end all processes of the Linux users that models run as, because their marks cannot be read without
    CAP_SYS_PTRACE.
    """
    found = processes.marked(state)
    processes.stop(found, LEFTOVER_GRACE_S)
    for uid in model_users.noted(state):
        model_users.end_left(uid)
    return found


def _after(child: Child, state: Path, report: Report) -> None:
    report(child.name, "stopping", "ending its replicas")
    command = Child(child.name, child.after_stop, child.env, probe=None, stop_order=0)
    process = launch.spawn(command, log_file(state, child.name))
    try:
        process.wait(SWEEP_LIMIT_S)
    except subprocess.TimeoutExpired:
        # sweep() will end the replicas that still run
        process.kill()
        process.wait()


def end_supervisor(supervisor: Process, limit_s: float, watch: Callable[[], None]) -> None:
    """Send SIGTERM to the supervisor, so that it stops the stack. After ``limit_s`` seconds, send SIGKILL."""
    supervisor.send(signal.SIGTERM)
    end = time.monotonic() + limit_s
    while supervisor.alive() and time.monotonic() < end:
        watch()
        time.sleep(processes.POLL_S)
    supervisor.send(signal.SIGKILL)
    processes.wait_gone([supervisor], 5.0)
