"""Supervise one child: start it, wait until it is ready, and restart it when it ends."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.stack import launch, probes, processes
from tidegate.stack.child import Child
from tidegate.stack.errors import ChildFailed

POLL_S = 0.15
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 60.0
"""A child that ran this long has recovered: after its next death the backoff begins again."""


def backoff_s(deaths: int) -> float:
    """Return the seconds to wait before a restart.

    ``deaths``: how many times in a row the child has died (at least 1). A run of more than ``STEADY_S``
    seconds begins a new row.
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

    async def _run_once(self, offset: int) -> int:
        """Start the process and wait for its end. Return the exit code."""
        self.process = launch.spawn(self.child, self.log)
        self._report("starting", process=processes.find(self.process.pid))
        if self.child.probe is not None:
            await self._wait_ready(self.process, offset)
        # Poll, because Popen.wait in a thread would block the exit of the interpreter.
        while (code := self.process.poll()) is None:
            await asyncio.sleep(POLL_S)
        return code

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
        self._deaths = 1 if lived_s > STEADY_S else self._deaths + 1
        self.restarts += 1
        delay = backoff_s(self._deaths)
        self._report("restarting", process=None, detail=f"exited with {code}; starts again in {delay:g} s")
        self._kill_group()
        await asyncio.sleep(delay)

    def _kill_group(self) -> None:
        # Other processes of the group, such as helpers of the Erlang VM, can survive the child. They would
        # keep the child's ports, and the restart would fail.
        if self.process:
            processes.kill_group(self.process.pid)

    def reap(self) -> None:
        """Collect the exit code of a stopped child, so that it does not remain a zombie."""
        if self.process:
            self.process.poll()

    def _report(self, state: str, **fields: Any) -> None:
        self.report(state=state, since=time.time(), restarts=self.restarts, **({"detail": ""} | fields))

    def _failure(self, what: str, offset: int) -> str:
        tail = launch.tail(self.log, start=offset) or "(it wrote nothing)"
        return f"{self.child.name} {what}. Its log, {self.log}, ends with:\n{tail}"
