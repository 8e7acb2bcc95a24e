"""Stopping a stack: its children in order, then whatever else carries its mark."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tidegate.kernel import model_users
from tidegate.stack import processes
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
    """Stop the children in their order, each for at most its grace, then sweep what is left of the stack."""
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
    """End every process that carries the stack's mark; the ones that were found.

    What runs as a model's user is ended too: its mark cannot be read without CAP_SYS_PTRACE.
    """
    found = processes.marked(state)
    processes.stop(found, LEFTOVER_GRACE_S)
    for uid in model_users.noted(state):
        model_users.end_left(uid)
    return found


def _after(child: Child, state: Path, report: Report) -> None:
    report(child.name, "stopping", "ending its replicas")
    with log_file(state, child.name).open("ab") as output:
        process = subprocess.Popen(
            child.after_stop,
            env=dict(child.env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        process.wait(SWEEP_LIMIT_S)
    except subprocess.TimeoutExpired:
        # The sweep by mark ends what it did not.
        process.kill()
        process.wait()


def end_supervisor(supervisor: Process, limit_s: float, watch: Callable[[], None]) -> None:
    """Ask the supervisor to stop its stack; SIGKILL it when it has not after ``limit_s`` seconds."""
    supervisor.send(signal.SIGTERM)
    end = time.monotonic() + limit_s
    while supervisor.alive() and time.monotonic() < end:
        watch()
        time.sleep(processes.POLL_S)
    supervisor.send(signal.SIGKILL)
    processes.wait_gone([supervisor], 5.0)
