"""The GPUs of this machine, as `nvidia-smi` lists them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Protocol

from services.autoscaler.domain.gpus import Gpu, read_inventory, visible
from services.autoscaler.domain.launcher import LaunchFailed
from tidegate.kernel import telemetry

log = telemetry.logger(__name__)

QUERY = ["--query-gpu=uuid,memory.total,name", "--format=csv,noheader,nounits"]
PROBE_TIMEOUT_S = 60.0
AGAIN_AFTER_S = 60.0


class Inventory(Protocol):
    """Tells which GPUs there are."""

    async def gpus(self) -> tuple[Gpu, ...]:
        """All of them. Raises ``Unavailable`` when that cannot be found out."""


class HostInventory:
    """See :class:`Inventory`: of this machine, those that the autoscaler's ``CUDA_VISIBLE_DEVICES`` leaves.

    GPUs that were found are remembered; else it looks again after a while.
    """

    def __init__(self, command: str = "nvidia-smi", clock: Callable[[], float] = time.monotonic) -> None:
        self._command = command
        self._clock = clock
        self._found: tuple[Gpu, ...] = ()
        self._problem = ""
        self._not_before = float("-inf")

    async def gpus(self) -> tuple[Gpu, ...]:
        """Return what `nvidia-smi` lists. Raises ``LaunchFailed`` with the reason when there is none."""
        if not self._found and self._clock() >= self._not_before:
            self._not_before = self._clock() + AGAIN_AFTER_S
            self._found, self._problem = await self._look()
        if not self._found:
            raise LaunchFailed(
                f"This host has no GPU to lease: {self._problem} Deploy without `gpus` and `gpu_memory_mb`, "
                "or start the stack on a host with an NVIDIA GPU and its driver."
            )
        return self._found

    async def _look(self) -> tuple[tuple[Gpu, ...], str]:
        """Return the GPUs, or none and why."""
        code, said = await _run([self._command, *QUERY])
        if code is None:
            return (), f"{said}."
        if code != 0:
            return (), f"{self._command} ended with {code}: {said.strip()[-300:]}."
        setting = os.environ.get("CUDA_VISIBLE_DEVICES")
        listed = read_inventory(said)
        found = visible(listed, setting)
        if found:
            log.info("GPUs of this host", extra={"gpus": [f"{gpu.uuid} {gpu.name}" for gpu in found]})
        if listed and not found:
            return (), f"CUDA_VISIBLE_DEVICES={setting!r} in the stack's environment excludes all GPUs."
        return found, "" if found else f"{self._command} lists none."


async def _run(command: list[str]) -> tuple[int | None, str]:
    """Return how a command ended and what it said; None and the reason when it did not run."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        return None, f"{command[0]} cannot be run ({error.strerror})"
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None, f"{command[0]} did not answer within {PROBE_TIMEOUT_S:g} s"
    return process.returncode, said.decode(errors="replace")
