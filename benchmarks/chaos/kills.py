"""Kills the parts of a running stack with SIGKILL, one after the other, and waits until each is back."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil

from benchmarks.client import Client
from benchmarks.errors import BenchmarkFailed
from benchmarks.stack import Stack
from tidegate.stack import processes
from tidegate.stack.processes import Process
from tidegate.stack.record import RunFolder

PARTS = (
    "rabbitmq",
    "worker",
    "valkey-jobs",
    "gateway",
    "registry",
    "triton",
    "autoscaler",
    "valkey",
    "router",
)
LIMIT_S = 120.0
POLL_S = 0.1
# After this time, reports about a worker are about its new process.
REPORTS_S = 1.5
# A part of the command line that identifies each process.
_COMMANDS = {"worker": "services.worker", "triton": "tritonserver"}


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: its time (seconds after the beginning), the part's absence, and the jobs until then."""

    part: str
    at_s: float
    away_s: float
    told: int


class Killer:
    """Kills the parts of one stack."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._autoscaler = Client(int(stack.env["TIDEGATE_AUTOSCALER_PORT"]))
        self._token = {"Authorization": f"Bearer {(stack.state / 'token').read_text().strip()}"}
        self.kills: list[Kill] = []

    def close(self) -> None:
        """Close the connections."""
        self._autoscaler.close()

    async def kill(self, part: str, began: float, told: Callable[[], int]) -> None:
        """Kill a part and return when it is back. Raise BenchmarkFailed if it does not come back."""
        victim = await self._until(lambda: self._found(part), f"{part} is there")
        at, count = time.monotonic(), told()
        # A server may be a script with child processes: all are killed together. A worker is killed alone,
        # like by the kernel when memory is short. Then Tidegate must end its Triton.
        victim.send(signal.SIGKILL, group=part not in _COMMANDS)
        await self._until(lambda: self._is_back(part, victim), f"{part} is back")
        away_s = time.monotonic() - at
        self.kills.append(Kill(part, at - began, away_s, count))
        text = f"{part:12} killed at {count:,} jobs, back {away_s:.1f} s later"
        print(f"  {at - began:6.1f} s  {text}", flush=True)

    async def _until(self, find: Callable[[], Awaitable[Process | None]], what: str) -> Process:
        end = time.monotonic() + LIMIT_S
        while (found := await find()) is None:
            if time.monotonic() > end:
                raise BenchmarkFailed(f"not within {LIMIT_S:.0f} s: {what}")
            await asyncio.sleep(POLL_S)
        return found

    async def _found(self, part: str) -> Process | None:
        if part in _COMMANDS:
            return await asyncio.to_thread(self._by_command, _COMMANDS[part])
        children = RunFolder(self._stack.state / "run").read().children
        return next((c.process for c in children if c.name == part and c.state == "ready"), None)

    def _by_command(self, word: str) -> Process | None:
        return next((p for p in processes.marked(self._stack.state) if word in p.command(limit=None)), None)

    async def _is_back(self, part: str, victim: Process) -> Process | None:
        found = await self._found(part)
        if found is None or found == victim:
            return None
        return found if part not in _COMMANDS or await self._worker_is_ready(found) else None

    async def _worker_is_ready(self, found: Process) -> bool:
        """Return True if ``found``, a worker or its Triton, belongs to a ready replica."""
        try:
            answer = await self._autoscaler.get("/v1/replicas", self._token)
            replicas = json.loads(answer.body)["items"]
            ready = {replica["pid"] for replica in replicas if replica["state"] == "ready"}
            process = psutil.Process(found.pid)
            told = time.time() - process.create_time() > REPORTS_S
            return told and bool(ready & {process.pid, process.ppid()})
        except (OSError, EOFError, ValueError, KeyError, psutil.NoSuchProcess):
            return False
