"""Supervise one child: start it, wait until it is ready, and restart it when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.kernel.service import handover as inheritance
from tidegate.stack import launch, probes, processes, sockets
from tidegate.stack.child import Child
from tidegate.stack.errors import ChildFailed
from tidegate.stack.sockets import Sockets

POLL_S = 0.15
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# A restart has failed if the child dies this many times before it is ready.
ENOUGH_DEATHS = 3
STEADY_S = 60.0
"""A child that ran this long has recovered: after its next death the backoff begins again."""


def backoff_s(deaths: int) -> float:
    """Return the seconds to wait before a restart.

    ``deaths``: how many times in a row the child has died (at least 1). If the child ran for more than
    ``STEADY_S`` seconds before it died, the count begins at 1 again.
    """
    return BACKOFF_S[min(deaths, len(BACKOFF_S)) - 1]


@dataclass(slots=True)
class ChildSupervisor:
    """The supervisor of one child.

    When the child's state changes, the supervisor passes the changed fields of the child's record to
    ``report``.
    """

    child: Child
    log: Path
    report: Callable[..., None]
    ready: Mapping[str, asyncio.Event]
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    _deaths: int = field(default=0)
    _sockets: Sockets = field(default_factory=dict)
    _replacing: bool = field(default=False)
    # Processes besides `process`: old ones that still finish their connections, and the new one of a restart
    # until it is ready.
    _others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _starts: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Keep the child running until this task is cancelled.

        If the child has no probe, return when the child has exited with 0. Raise ChildFailed if a required
        child ends before it was ever ready. Also raise ChildFailed if it is not ready within its time limit.
        An optional child has no time limit, and is started again when it ends.
        """
        for name in self.child.after:
            self._report("waiting", detail=f"for {name}")
            await self.ready[name].wait()
        while True:
            offset, began = launch.size(self.log), time.monotonic()
            code = await self._run_once(offset)
            if self.child.probe is None and code == 0:
                self._report("done", process=None)
                self.ready[self.child.name].set()
                return
            if self._must_be_ready():
                raise ChildFailed(self._failure(f"exited with {code} while starting", offset))
            await self._pause(code, time.monotonic() - began)

    async def replace(self, child: Child) -> None:
        """Start the child again, as ``child`` describes it. Return when the new process is ready.

        If the supervisor keeps the child's sockets, stop the old process only after the new one is ready.
        Otherwise, stop the old process first.

        Raise ChildFailed if the new process does not become ready. If the supervisor keeps the sockets, the
        old process has not been stopped in this case, and continues to serve.
        """
        old = self.process
        if old is None or old.poll() is not None:
            self.child = child  # `run` starts it soon
            await self._probed(child, launch.size(self.log), max(BACKOFF_S))
        elif self._sockets:
            async with self._starts:
                await self._hand_over(child)
        else:
            await self._stop_and_start(child, old)

    async def _hand_over(self, child: Child) -> None:
        """Start a new process beside the old one, then let the old one end its connections."""
        offset = launch.size(self.log)
        self._report("restarting", detail="the new process is starting; the old one still serves")
        reading, writing = os.pipe()
        new: subprocess.Popen[bytes] | None = None
        missing = "was stopped"
        try:
            new = self._spawned(child, ready=writing)
            self._others.append(new)
            missing = await self._heard(new, reading, child)
        finally:
            os.close(reading)
            os.close(writing)
            if missing and new is not None:
                processes.kill_group(new.pid)
        old = self.process
        alive = old is not None and old.poll() is None
        if missing:
            if alive:
                self._report("ready", detail="the last restart failed; the old process still serves")
            goes_on = "; the old process still serves" if alive else ""
            raise ChildFailed(self._failure(f"{missing}{goes_on}", offset))
        self._others.remove(new)
        self.child, self.process = child, new
        self.restarts += 1
        self._report("ready", process=processes.find(new.pid))
        if old is not None and alive:
            old.send_signal(signal.SIGUSR1)
            self._others.append(old)

    async def _heard(self, new: subprocess.Popen[bytes], reading: int, child: Child) -> str:
        """Wait until each process of the child has reported that it is ready.

        Return the problem; empty if there is none.
        """
        os.set_blocking(reading, False)
        heard, end = 0, time.monotonic() + child.start_limit_s
        while heard < child.processes:
            try:
                told = os.read(reading, 64)
            except BlockingIOError:
                told = b""
            heard += len(told)
            if new.poll() is not None:
                return f"exited with {new.returncode} while starting"
            if time.monotonic() > end:
                return f"was not ready after {child.start_limit_s:.0f} s"
            await asyncio.sleep(POLL_S)
        return ""

    async def _stop_and_start(self, child: Child, old: subprocess.Popen[bytes]) -> None:
        self.child, self._replacing = child, True
        self._report("restarting", detail="stopping")
        offset = launch.size(self.log)
        old.send_signal(signal.SIGTERM)
        killed_at = time.monotonic() + child.grace_s
        while self._replacing or self.process is old:
            if time.monotonic() > killed_at:
                old.kill()
            await asyncio.sleep(POLL_S)
        await self._probed(child, offset)

    async def _probed(self, child: Child, offset: int, more_s: float = 0.0) -> None:
        """Wait until the child answers its probe. ``more_s``: seconds in addition to the child's limit."""
        limit_s = child.start_limit_s + more_s
        end, restarts = time.monotonic() + limit_s, self.restarts
        while child.probe is not None and await asyncio.to_thread(probes.problem, child.probe) is not None:
            if time.monotonic() > end:
                text = f"was not ready after {limit_s:.0f} s. The supervisor keeps trying to start it"
                raise ChildFailed(self._failure(text, offset))
            if self.restarts >= restarts + ENOUGH_DEATHS:
                text = f"ended {ENOUGH_DEATHS} times while starting. The supervisor keeps trying to start it"
                raise ChildFailed(self._failure(text, offset))
            await asyncio.sleep(POLL_S)

    async def _run_once(self, offset: int) -> int:
        """Start the process and wait for its end. Return the exit code."""
        async with self._starts:  # a handover may have started a process meanwhile
            if self.process is None or self.process.poll() is not None:
                if self.child.sockets and not self._sockets:
                    self._sockets = self._bound()
                self.process = self._spawned(self.child)
                self._report("starting", process=processes.find(self.process.pid))
        if self.child.probe is not None:
            await self._wait_ready(self.process, offset)
        # Poll, because Popen.wait in a thread would block the exit of the interpreter.
        while (code := self.process.poll()) is None:
            self._others = [each for each in self._others if each.poll() is None]
            await asyncio.sleep(POLL_S)
        return code

    def _bound(self) -> Sockets:
        try:
            return sockets.bound(self.child.sockets, self.child.processes)
        except OSError as error:
            ports = ", ".join(str(port.number) for port in self.child.sockets.values())
            names = " or ".join(port.setting for port in self.child.sockets.values())
            raise ChildFailed(
                f"{self.child.name} cannot listen on the ports {ports}: {error.strerror}. "
                f"Free them, or change {names}"
            ) from None

    def _spawned(self, child: Child, ready: int | None = None) -> subprocess.Popen[bytes]:
        """Start a process of the child.

        ``ready``: the pipe to which the new process reports that it is ready.
        """
        passed = [each.fileno() for several in self._sockets.values() for each in several]
        variables = inheritance.variables(self._sockets, ready) if passed else {}
        passed += [] if ready is None else [ready]
        return launch.spawn(child, self.log, variables, passed)

    async def _wait_ready(self, process: subprocess.Popen[bytes], offset: int) -> None:
        assert self.child.probe is not None
        end, shown = time.monotonic() + self.child.start_limit_s, ""
        while process.poll() is None:
            missing = await asyncio.to_thread(probes.problem, self.child.probe)
            if missing is None:
                self._report("ready")
                self.ready[self.child.name].set()
                return
            if missing != shown:
                self._report("starting", detail=missing)
                shown = missing
            if time.monotonic() > end and self._must_be_ready():
                text = f"was not ready after {self.child.start_limit_s:.0f} s ({missing})"
                raise ChildFailed(self._failure(text, offset))
            await asyncio.sleep(POLL_S)

    def _must_be_ready(self) -> bool:
        """Return True if the stack's start still waits for this child.

        The start waits for each required child until the child was ready once.
        """
        return not self.child.optional and not self.ready[self.child.name].is_set()

    async def _pause(self, code: int, lived_s: float) -> None:
        if self._replacing:
            self._replacing = False
            self.restarts += 1
            self._kill_group()
            return
        self._deaths = 1 if lived_s > STEADY_S else self._deaths + 1
        self.restarts += 1
        delay = backoff_s(self._deaths)
        # Refuse connections, because callers should not wait for a process that keeps dying. But if `_starts`
        # is locked, a handover runs, and its new process may already listen.
        if self._deaths > 1 and not self._starts.locked():
            for each in (one for several in self._sockets.values() for one in several):
                inheritance.refuse(each.fileno())
        self._report("restarting", process=None, detail=f"exited with {code}; starts again in {delay:g} s")
        self._kill_group()
        await asyncio.sleep(delay)

    def _kill_group(self) -> None:
        # Other processes of the group, such as helpers of the Erlang VM, can survive the child. They would
        # keep the child's ports, and the restart would fail.
        if self.process:
            processes.kill_group(self.process.pid)

    def reap(self) -> None:
        """Collect the exit codes of stopped processes, so that they do not remain zombies."""
        for each in (self.process, *self._others):
            if each:
                each.poll()

    def close(self) -> None:
        """Close the kept sockets, and send SIGTERM to old processes that still finish their connections.

        The child's current process still listens. :class:`Supervisor` stops this process after this call.
        """
        sockets.close(self._sockets)
        for each in self._others:
            if each.poll() is None:
                each.send_signal(signal.SIGTERM)

    def _report(self, state: str, **fields: Any) -> None:
        self.report(state=state, since=time.time(), restarts=self.restarts, **({"detail": ""} | fields))

    def _failure(self, what: str, offset: int) -> str:
        tail = launch.tail(self.log, start=offset) or "(it wrote nothing)"
        return f"{self.child.name} {what}. The log of {self.child.name}, {self.log}, ends with:\n{tail}"
