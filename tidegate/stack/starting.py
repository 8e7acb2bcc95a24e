"""``up``: start a stack and wait until it is ready. Parts of the stack may already run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tidegate.client import started
from tidegate.kernel import credentials
from tidegate.kernel.blobs import object_store
from tidegate.kernel.settings.base import Settings
from tidegate.stack import launch, processes, shutdown, token
from tidegate.stack.child import Child
from tidegate.stack.errors import ChildFailed, MissingPart, StackError
from tidegate.stack.plan import log_file, plan
from tidegate.stack.ports import check_free
from tidegate.stack.record import ChildPhase, ChildRecord, RunFolder, StackRecord

POLL_S = 0.1
# The most seconds that `up` waits. This is longer than every child's limit, so that the supervisor can first
# report which child failed.
LIMIT_S = 600.0
GRACE_S = 15.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A change to show: a child's name, its new state, and a detail in a few words."""

    name: str
    state: ChildPhase
    detail: str
    elapsed_s: float


OnProgress = Callable[[Progress], None]


class ProgressReporter:
    """A reporter that compares each record with the earlier ones.

    It calls ``on_progress`` for each child whose state or detail has changed.
    """

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._began = time.monotonic()
        self._seen: dict[str, tuple[ChildPhase, str]] = {}

    def skip(self, record: StackRecord) -> None:
        """Treat the content of the record as already reported."""
        self._seen |= {child.name: (child.state, child.detail) for child in record.children}

    def show(self, record: StackRecord) -> None:
        """Report the changes since the last call."""
        for child in record.children:
            self.change(child.name, child.state, child.detail)

    def change(self, name: str, state: ChildPhase, detail: str) -> None:
        """Report one child's state if it is new."""
        if self._seen.get(name) != (state, detail):
            self._seen[name] = (state, detail)
            self._on_progress(Progress(name, state, detail, time.monotonic() - self._began))


def ignore(_: Progress) -> None:
    """Do nothing. This is the default for calling code that shows no progress."""


def up(settings: Settings, on_progress: OnProgress = ignore) -> StackRecord:
    """Start the stack if it does not run, and return when every required child is ready.

    Raise StackError (PortBusy, MissingPart, ChildFailed) with a complete message if this fails. If the
    supervisor ended during the start, also end the stack's other processes.
    """
    _check_stores(settings)
    before = os.umask(0o077)
    try:
        return _up(settings, on_progress)
    finally:
        os.umask(before)


def _up(settings: Settings, on_progress: OnProgress) -> StackRecord:
    state = settings.state_path
    folder = _private(state)
    with folder.turn():
        _prepare(settings)
        watch = ProgressReporter(on_progress)
        record = folder.read()
        if not (record.supervisor and record.supervisor.alive()):
            children = _planned(settings, record)
            return _wait(folder, _start_supervisor(children, state), watch, state)
        return _wait(folder, None, watch, state)


def run(settings: Settings) -> NoReturn:
    """Run the stack's supervisor in the foreground, for a service manager.

    Raise StackError for the same reasons as :func:`up`, and if the stack already runs.
    """
    _check_stores(settings)
    os.umask(0o077)
    state = settings.state_path
    folder = _private(state)
    with folder.turn():
        _prepare(settings)
        record = folder.read()
        if record.supervisor and record.supervisor.alive():
            raise StackError(
                f"The stack in {state} runs already, pid {record.supervisor.pid}: type `tidegate down` first."
            )
        supervisor = _supervisor(_planned(settings, record))
    os.execve(supervisor.argv[0], supervisor.argv, dict(supervisor.env))


def _private(state: Path) -> RunFolder:
    """Create the state folder, which only its owner can read. Return its run folder."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    state.chmod(0o700)  # because in an earlier release every user could read it
    return RunFolder(state / "run")


def _prepare(settings: Settings) -> None:
    """Create the folders, tokens and passwords that are missing."""
    state = settings.state_path
    for name in ("run", "log", "data"):
        (state / name).mkdir(parents=True, exist_ok=True)
    service_token = settings.service_token or token.ensure(state).read_text().strip()
    token.write_metrics_token(state, service_token)
    credentials.ensure(settings.secrets_path)


def _planned(settings: Settings, record: StackRecord) -> tuple[Child, ...]:
    """Stop children of an earlier start, store the settings, and return the children to start."""
    children = plan(settings, os.environ)
    _clear_leftovers(record, children)
    check_free(port for child in children for port in child.ports)
    started.write(settings.state_path, started.of(settings, os.environ))
    return children


def _check_stores(settings: Settings) -> None:
    """Raise MissingPart if a store's URL needs a driver that is not installed."""
    for name in ("artifact_url", "blob_url"):
        found = object_store.problem(f"TIDEGATE_{name.upper()}", getattr(settings, name))
        if found is not None:
            raise MissingPart(found)


def _clear_leftovers(record: StackRecord, children: Sequence[Child]) -> None:
    """Stop the children of a supervisor that died.

    Replicas are not stopped. The new autoscaler takes them over.
    """
    left = {c.name: c.process for c in record.children if c.process and c.process.alive()}
    for child in sorted(children, key=lambda c: c.stop_order):
        if process := left.pop(child.name, None):
            processes.stop([process], child.grace_s)
    processes.stop(list(left.values()), GRACE_S)  # the rest: children that the present profile does not have


def _start_supervisor(children: Sequence[Child], state: Path) -> subprocess.Popen[bytes]:
    return launch.spawn(_supervisor(children), log_file(state, "supervisor"))


def _supervisor(children: Sequence[Child]) -> Child:
    return Child(
        name="supervisor",
        argv=(sys.executable, "-P", "-m", "tidegate.stack"),
        # All services have the same environment. The supervisor also gets it, and so has the same resolved
        # settings.
        env=next(child for child in children if child.name == "migrate").env,
        probe=None,
        stop_order=0,
    )


def _wait(
    folder: RunFolder, started: subprocess.Popen[bytes] | None, watch: ProgressReporter, state: Path
) -> StackRecord:
    """Wait until the stack runs and its required children are ready. Return the stack's record.

    Raise ChildFailed if the supervisor ends before the stack is ready. Also raise ChildFailed if the stack is
    not ready after ``LIMIT_S`` seconds.
    """
    end = time.monotonic() + LIMIT_S
    while True:
        gone = started is not None and started.poll() is not None
        record = folder.read()
        fresh = started is None or (record.supervisor is not None and record.supervisor.pid == started.pid)
        if fresh:
            watch.show(record)
        if fresh and record.phase == "running" and not _unready(record):
            return record
        if gone or (started is None and not (record.supervisor and record.supervisor.alive())):
            shutdown.sweep(state)
            raise ChildFailed(record.error if fresh and record.error else _supervisor_died(state))
        if time.monotonic() > end:
            raise ChildFailed(f"Not ready after {LIMIT_S:.0f} s: {_unready(record)}")
        time.sleep(POLL_S)


def _unready(record: StackRecord) -> str:
    waiting = (c for c in record.children if not c.optional and c.state not in {"ready", "done"})
    return "; ".join(f"{c.name} is {c.state} ({c.detail or 'see ' + c.log})" for c in waiting)


def _supervisor_died(state: Path) -> str:
    log = log_file(state, "supervisor")
    return f"The supervisor died. Its log, {log}, ends with:\n{launch.tail(log)}"


def state(settings: Settings) -> StackRecord:
    """Return the supervisor's record. If the supervisor has died, check the state of each child instead."""
    record = RunFolder(settings.state_path / "run").read()
    if record.supervisor and record.supervisor.alive():
        return record
    children = tuple(_checked(child) for child in record.children)
    if any(child.process for child in children):
        return StackRecord("unattended", None, children, record.error)
    return StackRecord("failed" if record.phase == "failed" else "stopped", None, children, record.error)


def _checked(child: ChildRecord) -> ChildRecord:
    alive = child.process is not None and child.process.alive()
    detail = "runs without its supervisor: type `tidegate up` or `tidegate down`" if alive else ""
    return ChildRecord(
        child.name,
        "ready" if alive else "stopped",
        child.process if alive else None,
        child.ports,
        child.restarts,
        child.since,
        detail,
        child.log,
        child.optional,
    )
