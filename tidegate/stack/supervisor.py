"""The supervisor of the stack: ``python -m tidegate.stack``.

``up`` starts it as a background process. ``run`` starts it in the foreground, for a service manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tidegate.kernel import telemetry
from tidegate.kernel.settings.base import Settings
from tidegate.stack import log_rotation, processes, restarting, shutdown, systemd_notify
from tidegate.stack.child import Child
from tidegate.stack.child_supervisor import ChildSupervisor
from tidegate.stack.errors import StackError
from tidegate.stack.plan import log_file, plan
from tidegate.stack.record import ChildPhase, ChildRecord, RunFolder, StackRecord, with_child
from tidegate.stack.replanning import replanned
from tidegate.stack.restarting import RestartProgress
from tidegate.stack.systemd_notify import Notify

log = telemetry.logger(__name__)


class Supervisor:
    """The supervisor of all children. It keeps ``stack.json`` up to date."""

    def __init__(
        self, children: Sequence[Child], state: Path, notify: Notify = systemd_notify.ignore
    ) -> None:
        self._children = children
        self._notify = notify
        self._state = state
        self._folder = RunFolder(state / "run")
        self._supervised: list[ChildSupervisor] = []
        records = tuple(
            ChildRecord(
                c.name,
                ports=tuple(p.number for p in c.ports),
                log=str(log_file(state, c.name)),
                optional=c.optional,
            )
            for c in children
        )
        self._record = StackRecord("starting", processes.find(os.getpid()), records)

    async def run(self) -> int:
        """Run until SIGTERM or SIGINT, or until a child fails to start. Return the exit code."""
        if not self._folder.hold("supervisor"):
            log.error("another supervisor uses this state folder")
            return 1
        self._write()
        restarting.take_request(self._folder.path)  # drop a request to an earlier supervisor
        error = await self._keep_until_stopped()
        self._notify(f"STOPPING=1\nSTATUS={systemd_notify.line(error) or 'stopping'}")
        self._record = replace(self._record, phase="stopping", error=error)
        self._write()
        for child in self._supervised:
            child.close()
        await asyncio.to_thread(
            shutdown.stop_children, self._children, self._running(), self._state, self._report_stop
        )
        for child in self._supervised:
            child.reap()
        self._record = replace(self._record, phase="failed" if error else "stopped")
        self._write()
        return 1 if error else 0

    async def _keep_until_stopped(self) -> str:
        """Run every child until one fails or the stack is stopped. Return the error; empty after a stop."""
        ready = {child.name: asyncio.Event() for child in self._children}
        self._supervised = [self._supervise(child, ready) for child in self._children]
        stopped, restart = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, restart.set)
        tasks = [
            asyncio.create_task(supervised.run(), name=supervised.child.name)
            for supervised in self._supervised
        ]
        tasks += [
            asyncio.create_task(self._announce(ready)),
            asyncio.create_task(log_rotation.keep_short(self._state)),
            asyncio.create_task(self._restart_when_asked(restart)),
        ]
        stop = asyncio.create_task(stopped.wait())
        error = await _first_error(tasks, stop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return error

    def _supervise(self, child: Child, ready: Mapping[str, asyncio.Event]) -> ChildSupervisor:
        def report(**changes: Any) -> None:
            log.info("%s is %s", child.name, changes["state"], extra={"detail": changes["detail"]})
            self._record = with_child(self._record, child.name, **changes)
            self._write()

        return ChildSupervisor(child, log_file(self._state, child.name), report, ready)

    async def _announce(self, ready: Mapping[str, asyncio.Event]) -> None:
        for child in self._children:
            if not child.optional:
                await ready[child.name].wait()
        self._record = replace(self._record, phase="running")
        self._write()
        self._notify(f"READY=1\nSTATUS=running, {len(self._children)} parts ready")

    async def _restart_when_asked(self, asked: asyncio.Event) -> None:
        while True:
            await asked.wait()
            asked.clear()
            request = restarting.take_request(self._folder.path)
            progress = RestartProgress(request.id)
            try:
                if self._record.phase != "running":
                    raise StackError(
                        "Nothing was restarted: the stack is still starting. "
                        "Try again when `tidegate status` shows that all parts are ready."
                    )
                fresh = replanned(self._children, request)
                progress = replace(progress, services=tuple(child.name for child in fresh.children))
                self._tell(progress)
                for child in fresh.children:
                    await self._supervisor_of(child.name).replace(child)
                    progress = replace(progress, done=(*progress.done, child.name))
                    self._tell(progress)
                fresh.accept()
                names = {child.name: child for child in fresh.children}
                self._children = [names.get(child.name, child) for child in self._children]
                self._tell(replace(progress, finished=True))
                log.info("restarted %s", ", ".join(progress.done))
            except StackError as error:
                log.error("the restart failed: %s", error)
                self._tell(replace(progress, finished=True, error=str(error)))
            except Exception as error:  # an unexpected error must not stop the stack
                log.exception("the restart failed")
                self._tell(replace(progress, finished=True, error=f"The restart failed: {error!r}"))

    def _supervisor_of(self, name: str) -> ChildSupervisor:
        return next(each for each in self._supervised if each.child.name == name)

    def _tell(self, progress: RestartProgress) -> None:
        with contextlib.suppress(OSError):
            restarting.write_progress(self._folder.path, progress)

    def _running(self) -> dict[str, processes.Process]:
        return {c.name: c.process for c in self._record.children if c.process}

    def _report_stop(self, name: str, state: ChildPhase, detail: str) -> None:
        self._record = with_child(self._record, name, state=state, detail=detail, since=time.time())
        self._write()

    def _write(self) -> None:
        # A full disk must not end the supervisor.
        with contextlib.suppress(OSError):
            self._folder.write(self._record)


async def _first_error(tasks: Sequence[asyncio.Task[None]], stop: asyncio.Task[bool]) -> str:
    """Wait for ``stop`` or the first task that fails. Return the task's error; empty if stopped."""
    waiting: set[asyncio.Task[Any]] = {*tasks, stop}
    while not stop.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            if (error := task.exception()) is not None:
                log.error("%s", error)
                return str(error) if isinstance(error, StackError) else f"the supervisor failed: {error!r}"
    return ""


def main() -> int:
    """Read the settings from the environment and run the stack. Return the exit code."""
    os.umask(0o077)  # only this user may read files that this process and its children create

    # Remove NOTIFY_SOCKET, because children inherit the environment and must not notify systemd.
    notify = systemd_notify.to(os.environ.pop("NOTIFY_SOCKET", ""))
    settings = Settings()
    telemetry.configure("supervisor", settings.log_level)
    return asyncio.run(Supervisor(plan(settings, os.environ), settings.state_path, notify).run())
