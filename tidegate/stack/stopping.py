"""``down``: stop every process of the stack, even if its supervisor died."""

from __future__ import annotations

import os

from tidegate.kernel.settings.base import Settings
from tidegate.stack import processes, shutdown
from tidegate.stack.child import Child
from tidegate.stack.errors import MissingPart, StackError
from tidegate.stack.plan import SWEEP_LIMIT_S, plan
from tidegate.stack.record import RunFolder
from tidegate.stack.starting import OnProgress, ProgressReporter, ignore

# The most seconds that a stop takes: all grace times and the time to end the replicas. Usually a few seconds
# are enough.
LIMIT_S = 150.0 + SWEEP_LIMIT_S


def down(settings: Settings, on_progress: OnProgress = ignore) -> bool:
    """Stop the stack. Return True if a process ran. Raise StackError if a process cannot be ended."""
    state = settings.state_path
    folder = RunFolder(state / "run")
    if not folder.path.is_dir():
        return False
    with folder.turn():
        if not processes.marked(state):
            return False
        watch = ProgressReporter(on_progress)
        record = folder.read()
        watch.skip(record)
        if record.supervisor and record.supervisor.alive():
            shutdown.end_supervisor(record.supervisor, LIMIT_S, lambda: watch.show(folder.read()))
            record = folder.read()
            watch.show(record)
        if processes.marked(state):
            running = {c.name: c.process for c in record.children if c.process}
            shutdown.stop_children(_children(settings), running, state, watch.change)
        _verify(settings)
    return True


def _children(settings: Settings) -> tuple[Child, ...]:
    try:
        return plan(settings, os.environ)
    except MissingPart:
        # A program was uninstalled while it ran, so the plan cannot be made. Return no children. So
        # stop_children() ends all processes with the mark, in any order.
        return ()


def _verify(settings: Settings) -> None:
    left = processes.marked(settings.state_path)
    if left:
        names = "\n".join(f"  pid {p.pid}: {p.command()}" for p in left)
        raise StackError(f"These processes of the stack could not be ended (as root: kill -9 PID):\n{names}")
